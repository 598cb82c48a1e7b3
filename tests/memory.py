"""Peak memory of a piece of code, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
GIB = 1 << 30
# Thread pools, kernels' own buffers and what the allocator keeps: measured once, nothing to do with the shapes.
OVERHEAD = 96 * MIB

# One process imports everything once and forks a child for each probe, which starts with the same memory.
_PROBES = """
import json, os, sys, traceback
from pathlib import Path
import torch
from mobazoo.attention import MoBA, Full, Segments, Centroids, attend, centroids, route

torch.set_num_threads(2)
torch.manual_seed(0)

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def peak_of(work):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = status("VmRSS")
    kept = work()
    return status("VmHWM") - before

def small(**kw):  # the first call loads libraries and starts threads
    q = torch.randn(1, 2, 256, 16, requires_grad=True)
    attend(q, q, q, **kw).sum().backward()

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            exec(json.loads(line))
            said = peak_of(work)
        except BaseException:
            said = traceback.format_exc()
        print(json.dumps(said), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(json.dumps("the probe was killed"), flush=True)
"""
Peak = Callable[[str], int]


@contextmanager
def probes() -> Iterator[Peak]:
    """What says how many bytes above the starting point ``work()``, defined by the code it is given, needs at most."""
    with subprocess.Popen(
        [sys.executable, "-c", _PROBES], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        into, out = process.stdin, process.stdout

        def of(code: str) -> int:
            into.write(json.dumps(code) + "\n")
            into.flush()
            said = json.loads(out.readline())
            assert isinstance(said, int), said
            return said

        yield of
        into.close()
