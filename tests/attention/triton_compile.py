"""Compiles the Triton kernels to PTX without a GPU, as the launches would. Run by ``test_triton_compiles``.

    python -m tests.attention.triton_compile 90 bf16 128 128 7   capability, dtype, head dim, block size, reads
    python -m tests.attention.triton_compile 90                  a table of dtypes and head dims

Prints one line a kernel: name, bytes of shared memory, bytes that the table of tiles says, bytes of registers that did
not fit (spilled), registers, seconds. In a process of its own, because Triton decides when it is imported whether it
interprets.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mobazoo.attention.kernels import triton_backward, triton_forward, triton_gate
from mobazoo.attention.kernels.triton_tiles import Tiles, entry, gate_tiles, power_of_two, shared_bytes

INT32 = {"Order", "Edge", "Cell", "First", "Start", "Lo", "Block", "Readers", "BlockFrom", "BlockTo"}
INT64 = {"Begin", "From", "To"}
FLOAT32 = {"PartLse", "Lse", "Delta"}
NUMBERS = {"t0", "tokens", "pair0", "pairs", "N", "BS", "T", "S", "tiles", "rows", "HKV", "G", "W", "HQ"}
STRIDE = re.compile("[qkvgm]_[bhtsn]")
KERNELS = {
    triton_forward.routed: "forward",
    triton_forward.own: "forward",
    triton_backward.delta: "backward",
    triton_backward.queries_routed: "backward",
    triton_backward.queries_own: "backward",
    triton_backward.keys: "keys",
    triton_gate.means: "gate",
    triton_gate.gate: "gate",
}


def kind(name: str, element: str) -> str:
    if name in INT64:
        return "*i64"
    if name == "Index":
        return "*i16"
    if name in INT32:
        return "*i32"
    if name in FLOAT32:
        return "*fp32"
    if name == "scale":
        return "fp32"
    return "i32" if name in NUMBERS or STRIDE.fullmatch(name) else f"*{element}"


def held_by(kernels: str, capability: int, dim: int, itemsize: int, block_size: int, reads: int) -> Tiles:
    """As the launches choose them for a long sequence."""
    name = f"{capability // 10}.{capability % 10}"
    found = entry(kernels, dim, itemsize, name)
    if kernels == "gate":
        return replace(found, rows=gate_tiles(dim, itemsize, 1 << 20, reads, 1 << 20, torch.device("cpu")).rows)
    streamed = found.rows if kernels == "keys" else found.stream
    return replace(found, **{"rows" if kernels == "keys" else "stream": min(streamed, power_of_two(block_size))})


def compiled(
    capability: int, element: str, dim: int, block_size: int, reads: int
) -> Iterator[tuple[str, int, int, int, int, float]]:
    """Of each kernel what a line says."""
    itemsize = 4 if element == "fp32" else 2
    for kernel, kernels in KERNELS.items():
        held = held_by(kernels, capability, dim, itemsize, block_size, reads)
        given = {"D": dim, "DP": power_of_two(dim), "BM": held.rows, "BN": held.stream, "ROUTED": True}
        given["KEPT"] = 1 << (reads - 1).bit_length()
        names = list(kernel.arg_names)
        constants = {name: value for name, value in given.items() if name in names}
        if kernel is triton_backward.keys:
            constants |= {"BM": held.stream, "BN": held.rows}
        if kernel is triton_gate.means:
            constants["BM"] = min(32, power_of_two(block_size))
        signature = {n: "constexpr" if n in constants else kind(n, element) for n in names}
        # Pointers and strides are multiples of 16, as torch's are.
        even = [["tt.divisibility", 16]]
        wide = {(i,): even for i, n in enumerate(names) if signature[n][0] == "*" or STRIDE.fullmatch(n)}
        source = ASTSource(kernel, signature, {(names.index(n),): c for n, c in constants.items()}, wide)
        options = {"num_warps": held.warps, "num_stages": held.stages}
        begin = time.perf_counter()
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        seconds = time.perf_counter() - begin
        counted = shared_bytes(kernels, power_of_two(dim), itemsize, held)
        yield kernel.__name__, built.metadata.shared, counted, *registers(built.asm["ptx"], capability), seconds


def registers(ptx: str, capability: int) -> tuple[int, int]:
    """Bytes of spill stores and registers of a thread, by the assembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={arch}", str(text), "-o", str(text.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills, used = (re.search(pattern, said) for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers"))
    return int(spills[1]) if spills else 0, int(used[1]) if used else 0


def table(capability: int) -> None:
    """Registers of a thread by kernel, and the bytes that did not fit in brackets, with block 128 and 7 reads."""
    for element in ("bf16", "fp32"):
        for dim in (64, 96, 128, 256):
            found = {name: (used, spill) for name, _, _, spill, used, _ in compiled(capability, element, dim, 128, 7)}
            if (element, dim) == ("bf16", 64):
                print(
                    f"| dtype, head dim | {' | '.join(f'`{name}`' for name in found)} |", "| --- " * 9 + "|", sep="\n"
                )
            cells = (f"{used} ({spill})" if spill else str(used) for used, spill in found.values())
            print(f"| {element}, {dim} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    capability, *rest = sys.argv[1:]
    if rest:
        for *line, seconds in compiled(int(capability), rest[0], *map(int, rest[1:])):
            print(*line, f"{seconds:.1f}", flush=True)
    else:
        table(int(capability))
