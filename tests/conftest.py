"""Set before torch loads: waiting threads sleep instead of spinning, which on a shared machine is five times faster."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
