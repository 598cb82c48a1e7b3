"""Compiles the Triton kernels to PTX without a GPU, as the launches would. Run by ``test_triton_compiles``.

Prints one line a kernel: name, bytes of shared memory, registers that did not fit (spilled bytes). In a process of its
own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mobazoo.attention.kernels import triton_backward, triton_forward
from mobazoo.attention.kernels.triton_tiles import power_of_two, tiles

INT32 = {"Order", "Edge", "Cell", "First", "Start", "Lo", "Block", "Readers", "BlockFrom", "BlockTo"}
FLOAT32 = {"PartLse", "Lse", "Delta"}
NUMBERS = {"t0", "tokens", "pair0", "pairs", "N", "BS", "T", "S", "tiles", "rows", "HKV", "G", "W", "HQ"}
KERNELS = [
    triton_forward.routed,
    triton_forward.own,
    triton_backward.delta,
    triton_backward.queries_routed,
    triton_backward.queries_own,
    triton_backward.keys,
]


def kind(name: str, element: str) -> str:
    if name == "Begin":
        return "*i64"
    if name in INT32:
        return "*i32"
    if name in FLOAT32:
        return "*fp32"
    if name == "scale":
        return "fp32"
    return "i32" if name in NUMBERS or re.fullmatch("[qkvg]_[bhts]", name) else f"*{element}"


def main(capability: int, element: str, dim: int, block_size: int) -> None:
    itemsize = 4 if element == "fp32" else 2
    held = tiles(dim, itemsize, 1 << 20, block_size)
    given = {"D": dim, "DP": power_of_two(dim), "BM": held.rows, "BN": held.stream, "ROUTED": True}
    for kernel in KERNELS:
        names = list(kernel.arg_names)
        constants = {name: value for name, value in given.items() if name in names}
        if kernel is triton_backward.keys:
            constants |= {"BM": held.stream, "BN": held.rows}
        signature = {n: "constexpr" if n in constants else kind(n, element) for n in names}
        # Pointers and strides are multiples of 16, as torch's are.
        even = [["tt.divisibility", 16]]
        wide = {(i,): even for i, n in enumerate(names) if signature[n][0] == "*" or re.fullmatch("[qkvg]_[bhts]", n)}
        source = ASTSource(kernel, signature, {(names.index(n),): c for n, c in constants.items()}, wide)
        options = {"num_warps": held.warps, "num_stages": held.stages}
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(kernel.__name__, built.metadata.shared, spilled(built.asm["ptx"], capability), flush=True)


def spilled(ptx: str, capability: int) -> int:
    """Bytes of spill stores, by the assembler that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={arch}", str(text), "-o", str(text.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"(\d+) bytes spill stores", said)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
