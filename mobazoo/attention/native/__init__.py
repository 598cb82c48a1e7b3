"""Loops in C++ for what torch's operators do badly on a CPU. A C++ compiler makes them once, when they are first used.

Whoever calls one has the same in torch's operators beside it, for machines without a compiler.
"""

from mobazoo.attention.native.build import compiler, library

__all__ = ["compiler", "library"]
