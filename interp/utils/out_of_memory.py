"""Recognise lack of memory on any device, and free what can be freed."""

from __future__ import annotations

import gc

MESSAGES = ("can't allocate memory", "out of memory")  # of a plain RuntimeError, as from the CPU or MPS


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports lack of memory, on any device."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def free_memory() -> None:
    """Collect garbage, and return unused blocks of the GPU to the driver."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
