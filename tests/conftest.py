"""Set before torch loads: waiting threads sleep, because on a shared machine spinning starves the others."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
