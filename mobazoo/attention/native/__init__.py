"""C++ for a CPU: attention, and the gate's choice. A C++ compiler makes it once, when it is first used.

Whoever calls it has the same in torch's operators beside it, for machines without a compiler.
"""

from mobazoo.attention.native.build import compiler, library

__all__ = ["compiler", "library"]
