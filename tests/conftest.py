"""Set before torch and triton load: waiting threads sleep, because on a shared machine spinning starves the others."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # our Triton kernels then run on the CPU; compiled ones do not change
