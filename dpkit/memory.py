"""Memory on a CPU: kept by the C library from step to step.

glibc gives a freed block back to the system, which hands out zeroed pages when it is asked again: at the start, blocks
of 128 KiB and more, and what is free at the end of its heap. From the blocks that it sees freed it learns to keep
larger ones, up to 32 MiB. What a training step allocates often lies in between, and taking the same pages anew in every
step can cost a tenth of it.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def keep_freed() -> None:
    """Teach it at once, by freeing one block of that size, whose pages are never touched. Other C libraries may not
    learn, and lose nothing; who set MALLOC_MMAP_THRESHOLD_ or the like has chosen otherwise, and it is obeyed."""
    torch.empty(_LARGEST, dtype=torch.uint8)


_LARGEST = 31 << 20
