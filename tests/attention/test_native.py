"""Compiled loops: the same as torch's operators, compiled once, and plain words where nothing can be compiled."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mobazoo.attention.kernels import cpu_masked
from mobazoo.attention.kernels.cpu_rows import add, fold, gather
from mobazoo.attention.native import build, library
from tests.attention.parity.cases import SPARSE
from tests.factories import inputs, oracle, random_routes, run
from tests.tolerance import check

needs_compiler = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

ROWS = torch.tensor([0, 3, 4, 17, 29, 30, 31, 45, 46, 60, 61, 62, 63, 64, 99])


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 64, 67])
def test_gather(dtype: torch.dtype, dim: int) -> None:
    source = torch.randn(100, dim).to(dtype)
    for rows in (ROWS, ROWS[:1], ROWS[:0]):
        assert torch.equal(gather(source, rows), source[rows])
        filled = gather(source, rows, 5)
        assert torch.equal(filled[: len(rows)], source[rows])
        assert torch.equal(filled[len(rows) :], torch.zeros(5, dim, dtype=dtype))


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_fold_merges_softmaxes(dtype: torch.dtype, dim: int) -> None:
    """Against float64: equal weights, one that is next to nothing, keys that nobody reads."""
    torch.manual_seed(dim)
    out, lse = torch.randn(100, dim, dtype=dtype), torch.randn(100, dtype=dtype) * 5
    part, part_lse = torch.randn(len(ROWS), dim, dtype=dtype), torch.randn(len(ROWS), dtype=dtype) * 5
    part_lse[0], part_lse[1], part_lse[2], part_lse[3] = lse[ROWS[0]], 1e4, -1e4, -torch.inf
    want, want_lse = out.double(), lse.double()
    both = torch.stack([want_lse[ROWS], part_lse.double()])
    weights = both.softmax(0)[..., None]
    want[ROWS] = weights[0] * want[ROWS] + weights[1] * part.double()
    want_lse[ROWS] = both.logsumexp(0)
    untouched = out[1].clone()
    fold(out, lse, ROWS, part, part_lse)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[1], untouched)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dim", [1, 33, 64])
def test_add(dtype: torch.dtype, scale: float, dim: int) -> None:
    for sums in (torch.randn(100, dim), torch.randn(100, dim, dtype=torch.float64)):
        part = torch.randn(dim, len(ROWS)).to(dtype).T  # not contiguous
        want = sums.double()
        want[ROWS] += scale * part.double()
        add(sums, ROWS, part, scale)
        torch.testing.assert_close(sums.double(), want, rtol=1e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_are_shared_among_torchs_threads(threads: int) -> None:
    """More rows than one thread takes, which no number of threads divides, each done once and none beyond."""
    rows = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:2003].sort().values
    source, out, lse = torch.randn(5000, 16), torch.randn(5000, 16), torch.randn(5000)
    part, part_lse = torch.randn(2003, 16), torch.randn(2003)
    want, want_lse = out.clone(), lse.clone()
    for some in torch.arange(2003).split(100):
        fold(want, want_lse, rows[some], part[some], part_lse[some])  # too few for a second thread
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(gather(source, rows), source[rows])
        fold(out, lse, rows, part, part_lse)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@needs_compiler
def test_fewer_threads_than_torch_counts_on_do_all_of_the_work() -> None:
    code = """
import torch
from mobazoo.attention.kernels.cpu_rows import gather
torch.set_num_threads(4)
source = torch.randn(5000, 16)
rows = torch.arange(0, 5000, 2)
assert torch.get_num_threads() == 4
assert torch.equal(gather(source, rows), source[rows])
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_THREAD_LIMIT": "2"}, check=True, timeout=120)


@pytest.mark.parametrize("name", ["b1k2", "b7k3", "b64k3", "b100k2", "chunk", "middle", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flash_without_a_compiler(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_library", lambda: None)
    case = SPARSE[name]
    data, (routes, chosen) = inputs(case, dtype), random_routes(case)
    reference = run(case, data, "reference", routes=routes, grad=True)
    check(run(case, data, "flash", routes=routes, grad=True), oracle(case, data, chosen), reference, "flash")


@needs_compiler
def test_loops_are_what_attention_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the tests of "compiled" would be tests of nothing."""

    class Spy:
        def __init__(self) -> None:
            self.called: set[str] = set()

        def __getattr__(self, name: str) -> object:
            self.called.add(name)
            return getattr(library(), name)

    spy = Spy()
    for module in ("routing", "selection", "kernels.cpu_reads", "kernels.cpu_rows"):
        monkeypatch.setattr(f"mobazoo.attention.{module}.library", lambda: spy)
    monkeypatch.setattr(cpu_masked, "_pays", lambda *_: False)
    case = SPARSE["b7k3"]
    for dtype in (torch.float32, torch.bfloat16):
        run(case, inputs(case, dtype), "flash", grad=True)
    assert spy.called >= {"moba_choose", "moba_gather", "moba_fold", "moba_add"}
    assert set(build._SIGNATURES) - spy.called <= {"moba_add_bfloat16"}  # only where a processor multiplies it


# What follows compiles for itself, in a cache of its own.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._library.cache_clear()
    yield tmp_path / "mobazoo"
    build._library.cache_clear()


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
def test_a_broken_file_is_compiled_anew(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    cache.mkdir()
    broken = cache / f"cpu-{build._digest()}.so"
    broken.write_text("something else")
    assert library() is not None
    assert compiles(caplog) == 1
    assert list(cache.iterdir()) == [broken]
    assert broken.read_bytes()[1:4] == b"ELF" or sys.platform != "linux"


@needs_compiler
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
def test_a_cache_that_takes_no_files(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    cache.write_text("a file where the folder should be")
    assert library() is not None
    assert "not kept, so that every process compiles anew" in caplog.text
    assert "File exists" in caplog.text
    assert cache.read_text() == "a file where the folder should be"


@needs_compiler
def test_nobody_is_at_home(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home directory")))
    assert library() is not None
    assert "compiles anew: no home directory" in caplog.text


@needs_compiler
def test_code_is_not_loaded_from_where_others_may_write(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mobazoo.attention")
    cache.mkdir()
    cache.chmod(0o777)
    planted = cache / f"cpu-{build._digest()}.so"
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
    assert torch.equal(gather(torch.ones(3, 2), torch.tensor([2])), torch.ones(1, 2))


def test_says_where_nothing_is_compiled(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_POSIX", False)
    assert library() is None
    assert "its loops in C++ are for Linux and macOS, this is " in caplog.text
    assert not cache.exists()


@needs_compiler
def test_several_processes_at_once(cache: Path) -> None:
    """None loads what another has half written."""
    code = "from mobazoo.attention.native import library; assert library() is not None"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache.parent)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
    assert [process.wait(120) for process in started] == [0] * 4
    assert len(list(cache.iterdir())) == 1
