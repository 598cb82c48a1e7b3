"""A hint to the C allocator, for CPU code that makes and frees many middle-sized tensors."""

import torch

# glibc raises its threshold to the size of the largest mapped block that was freed, up to 32 MiB with its header.
_LARGEST = (32 << 20) - (8 << 10)


def keep_heap() -> None:
    """Makes glibc keep freed blocks of up to 32 MiB instead of returning them to the system one by one.

    Otherwise each temporary of a few hundred KiB is mapped anew and faults in page by page. The block is never
    touched, so this costs microseconds and no memory; with another allocator it does nothing.
    """
    torch.empty(_LARGEST, dtype=torch.uint8)
