"""The real entry point in a process of its own: help, what it imports, exit codes, what goes where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

from mobazoo.cli.assemble import discover

ROOT = Path(__file__).parents[2]
VERBS = list(discover())


def mobazoo(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mobazoo", *args]
    settings = {**os.environ, "COLUMNS": "200", **env}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=settings, stdin=subprocess.DEVNULL)


def test_the_installed_script_is_this_entry_point() -> None:
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["mobazoo"]
    module, _, name = script.partition(":")
    assert callable(getattr(import_module(module), name))


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, time; sys.argv = ['mobazoo', '--help']; import mobazoo.cli\n"
        "try: mobazoo.cli.main()\n"
        "finally: print(time.process_time(), [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, _, heavy = done.stdout.splitlines()[-1].partition(" ")
    assert heavy == "[]"
    assert float(seconds) < 1
    for verb in VERBS:
        assert f" {verb} " in done.stdout


def test_help_lists_verbs_in_the_order_of_work() -> None:
    text = mobazoo("--help").stdout
    order = [text.index(f"│ {verb} ") for verb in ("models", "recipes", "show", "copy", "convert", "generate", "run")]
    assert order == sorted(order)


def test_every_verb_has_an_example_in_its_help() -> None:
    code = (
        "import sys, mobazoo.cli\n"
        "for verb in sys.argv[1:]:\n"
        "    sys.argv = ['mobazoo', verb, '--help']\n"
        "    try: mobazoo.cli.main()\n"
        "    except SystemExit as left: print('left', verb, left.code)"
    )
    verbs = [verb for verb in VERBS if verb != "bench"]
    done = subprocess.run([sys.executable, "-c", code, *verbs], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for verb in verbs:
        assert f"Example: mobazoo {verb}" in done.stdout
        assert f"left {verb} 0\n" in done.stdout


def test_a_user_error_is_one_line_on_stderr_and_exit_2() -> None:
    done = mobazoo("convert", "moba-4096x13", "source=a", "dest=b")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: recipe 'moba-4096x13': no such file, and none of that name is shipped; did you mean 'moba-4096x12'?\n"
    )


def test_a_wrong_verb_names_the_nearest() -> None:
    done = mobazoo("recipe")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: No such command 'recipe'. Did you mean 'recipes'?\n"


def test_a_bug_is_a_traceback() -> None:
    code = (
        "import sys, mobazoo.cli.verbs.recipes as verb; verb.shipped = lambda package: 1 / 0\n"
        "sys.argv = ['mobazoo', 'recipes']; import mobazoo.cli; mobazoo.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c_leaves_with_130_and_no_traceback() -> None:
    code = (
        "import sys, time, mobazoo.cli.verbs.recipes as verb\n"
        "def wait(package): print('ready', flush=True); time.sleep(60)\n"
        "verb.shipped = wait; sys.argv = ['mobazoo', 'recipes']; import mobazoo.cli; mobazoo.cli.main()"
    )
    # A shell without job control starts background jobs with the signal ignored, and children inherit that.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == b""


def test_a_reader_that_leaves_is_no_error() -> None:
    # The pipe's other end is closed before anything is written.
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "mobazoo", "recipes"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 141


def test_piped_tables_are_plain_tab_separated_and_whole() -> None:
    done = mobazoo("recipes", COLUMNS="20", FORCE_COLOR="")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines[0] == ["name", "purpose", "command"]
    assert {len(line) for line in lines} == {3}
    assert any(line[2].startswith("mobazoo convert moba-4096x12 source=") for line in lines)
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout


def test_version() -> None:
    assert mobazoo("--version").stdout.startswith("mobazoo 0.")
