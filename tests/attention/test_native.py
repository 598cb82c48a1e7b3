"""Compiled code: what attention runs, compiled once, and plain words where nothing can be compiled."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mobazoo.attention.kernels import cpu_compiled
from mobazoo.attention.native import build, library
from tests.attention.parity.cases import SPARSE
from tests.factories import Case, inputs, oracle, random_routes, run
from tests.tolerance import check

needs_compiler = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

SMALL = SPARSE["b7k3"]


def check_flash(case: Case, dtype: torch.dtype) -> None:
    """Flash attention of a case and its gradients against the float64 oracle."""
    data, (routes, chosen) = inputs(case, dtype), random_routes(case)
    reference = run(case, data, "reference", routes=routes, grad=True)
    check(run(case, data, "flash", routes=routes, grad=True), oracle(case, data, chosen), reference, "flash")


@needs_compiler
def test_fewer_threads_than_torch_counts_on_do_all_of_the_work() -> None:
    """Output and gradients of four threads, of which two are allowed, are those of one."""
    code = """
import torch
from mobazoo.attention import MoBA, attend
def both(threads):
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    out = attend(q, q, q, pattern=MoBA(16, 3), backend="flash")
    return out.detach(), *torch.autograd.grad(out.square().sum(), [q])
q = torch.randn(1, 2, 4096, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
for many, one in zip(both(4), both(1)):
    torch.testing.assert_close(many, one)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_THREAD_LIMIT": "2"}, check=True, timeout=120)


@pytest.mark.parametrize("name", ["b1k2", "b7k3", "b64k3", "b100k2", "chunk", "middle", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("by_torch")
def test_flash_without_a_compiler(name: str, dtype: torch.dtype) -> None:
    check_flash(SPARSE[name], dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loops_are_what_attention_runs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function that is compiled, or the tests of "compiled" would be tests of nothing."""
    called: set[str] = set()

    class Spy:
        def __getattr__(self, name: str) -> object:
            called.add(name)
            return getattr(library(), name)

    attention = [name for name in sys.modules if re.match(r"mobazoo\.attention\.(?!native(\.build)?$)", name)]
    for module in map(sys.modules.get, attention):
        if getattr(module, "library", None) is library:
            monkeypatch.setattr(module, "library", Spy)
    run(SMALL, inputs(SMALL, dtype), "flash", grad=True)
    assert called == set(build._SIGNATURES) >= {"moba_forward", "moba_backward"}


@needs_compiler
def test_float64_is_not_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_compiled, "_run", None)
    check_flash(SMALL, torch.float64)
    with pytest.raises(TypeError, match="not callable"):
        check_flash(SMALL, torch.float32)


@pytest.mark.parametrize("of", ["SOURCES", "HEADERS"])
def test_a_change_of_any_file_is_other_code(of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a header, which no compiler is given by name."""
    files, before = getattr(build, of), build._digest()
    assert files
    for number, changed in enumerate(files):
        copy = tmp_path / changed.name
        copy.write_text(changed.read_text("utf-8") + "\n// changed\n", "utf-8")
        monkeypatch.setattr(build, of, [*files[:number], copy, *files[number + 1 :]])
        assert build._digest() != before
    monkeypatch.setattr(build, of, files)
    assert build._digest() == before


def test_every_file_is_compiled_or_included() -> None:
    """What is not among the files above could change without being compiled anew."""
    folder = Path(build.__file__).parent
    assert {*build.SOURCES, *build.HEADERS} == {each for each in folder.iterdir() if each.suffix in (".cpp", ".h")}
    for each in (*build.SOURCES, *build.HEADERS):
        included = re.findall(r'#include "(.*)"', each.read_text("utf-8"))
        assert {folder / name for name in included} <= set(build.HEADERS)


# What follows compiles for itself, in a cache of its own: once all of it, then functions of the same names.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._library.cache_clear()
    yield tmp_path / "mobazoo"
    build._library.cache_clear()


@pytest.fixture
def brief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles in a moment; all of the library's takes some ten seconds."""
    source = tmp_path / "brief.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in build._SIGNATURES))
    monkeypatch.setattr(build, "SOURCES", [source])
    return source


def compiles(log: pytest.LogCaptureFixture) -> int:
    return sum("compiling" in record.message for record in log.records)


@needs_compiler
def test_compiles_once_for_a_machine(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    for _ in range(2):
        build._library.cache_clear()
        assert library() is not None
    assert compiles(caplog) == 1
    (kept,) = cache.iterdir()
    assert kept.suffix == ".so"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.usefixtures("brief")
def test_a_broken_file_is_compiled_anew(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    assert library() is not None
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    broken = [
        content[: len(content) // 2],
        content[: len(content) // 2].ljust(len(content), b"\0"),
        b"",
        b"something else",
    ]
    for times, each in enumerate(broken, 2):
        kept.unlink()  # this process has it in its memory
        kept.write_bytes(each)
        build._library.cache_clear()
        assert library() is not None
        assert compiles(caplog) == times
        (kept,) = cache.iterdir()
        assert kept.read_bytes()[:4] == content[:4]
        assert len(kept.read_bytes()) == len(content)


@needs_compiler
@pytest.mark.usefixtures("brief")
def test_other_source_processor_or_compiler_is_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    build._library.cache_clear()
    library()
    monkeypatch.setattr(build, "_OPTIONS", (*build._OPTIONS, "-g0"))
    build._library.cache_clear()
    library()
    assert len(list(cache.iterdir())) == 3


@needs_compiler
@pytest.mark.usefixtures("brief")
def test_a_cache_that_takes_no_files(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    cache.write_text("a file where the folder should be")
    assert library() is not None
    assert "not kept, so that every process compiles anew" in caplog.text
    assert "File exists" in caplog.text
    assert cache.read_text() == "a file where the folder should be"


@needs_compiler
@pytest.mark.usefixtures("brief")
def test_nobody_is_at_home(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert library() is not None
    assert "compiles anew: no home directory" in caplog.text


@needs_compiler
@pytest.mark.usefixtures("brief")
def test_code_is_not_loaded_from_where_others_may_write(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    cache.mkdir()
    cache.chmod(0o777)
    planted = cache / f"cpu-{build._digest()}-{hashlib.sha256(b'not ours').hexdigest()[:16]}.so"
    planted.write_text("not ours")
    assert library() is not None
    assert "others may write there" in caplog.text
    assert planted.read_text() == "not ours"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "the C++ compiler '{}' is not there; install it or set CXX"),
        ("echo 'cpu.cpp:3: error: such is life' >&2; exit 3", "{} ends with 3 (cpu.cpp:3: error: such is life)"),
        ("exit 1", "{} ends with 1 (it said nothing)"),
        ("exit 0", "no such file"),
        ("printf 'error: \\377\\376' >&2; exit 3", "{} ends with 3 (error: \ufffd\ufffd)"),
        ("sleep 5", "{} took more than 1 s; set CXX to another compiler"),
    ],
)
def test_says_why_nothing_was_compiled(
    script: str | None, said: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, on one line; attention then takes torch's operators."""
    compiler = cache.parent / "compiler"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "_LONGEST", 1)
    assert library() is library() is None
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert said.format(compiler) in record.message.replace("No such", "no such")
    assert "\n" not in record.message
    check_flash(SMALL, torch.float32)


def test_says_where_nothing_is_compiled(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_POSIX", False)
    assert library() is None
    assert "its code in C++ is for Linux and macOS, this is " in caplog.text
    assert not cache.exists()


@pytest.mark.parametrize("command", ['g++ "x', "", "   "])
def test_says_that_a_command_is_none(
    command: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", command)
    assert library() is None
    assert f"the C++ compiler {command!r} is " in caplog.text
    assert list(cache.iterdir()) == []


@needs_compiler
def test_code_without_its_functions_is_not_taken(cache: Path, brief: Path, caplog: pytest.LogCaptureFixture) -> None:
    brief.write_text('extern "C" void moba_forward() {}\n')
    assert library() is None
    assert "has no moba_" in caplog.text
    assert list(cache.iterdir()) == []


@needs_compiler
@pytest.mark.usefixtures("brief")
def test_what_killed_compilations_left_is_removed(cache: Path) -> None:
    old, new = cache / f"{build._UNFINISHED}old", cache / f"{build._UNFINISHED}new"
    for each in (old, new):
        each.mkdir(parents=True)
        (each / "half").write_text("written")
    cache.chmod(0o700)
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    assert library() is not None
    assert not old.exists()
    assert new.exists()


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_while_another_thread_compiles() -> None:
    """In the child nobody holds what is held there."""
    code = """
import os, threading, time
from mobazoo.attention.native import build
build._load = lambda: time.sleep(3)
thread = threading.Thread(target=build.library)
thread.start()
time.sleep(0.5)
child = os.fork()
if not child:
    build._load = lambda: "loaded"
    assert build.library() == "loaded"
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
thread.join()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@needs_compiler
def test_several_processes_at_once(cache: Path, brief: Path) -> None:
    """None loads what another has half written."""
    code = f"""
from pathlib import Path
from mobazoo.attention.native import build, library
build.SOURCES = [Path({str(brief)!r})]
assert library() is not None
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache.parent)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait(120) for process in started] == [0] * 4
    assert len(list(cache.iterdir())) == 1
