"""Where tests of the Triton backend run: in Triton's interpreter, on CPU tensors, or the same bodies on a GPU."""

import os
from dataclasses import fields, is_dataclass, replace

import headstats
import torch

ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
DEVICE = "cuda" if ON_GPU else "cpu"


def moved(x, device):
    """Every tensor in it on a device; gradients find the way back."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, tuple):
        parts = [moved(one, device) for one in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, dict):
        return {name: moved(one, device) for name, one in x.items()}
    if is_dataclass(x):
        return replace(x, **{f.name: moved(getattr(x, f.name), device) for f in fields(x)})
    return x


def attend(q, k, v, backend="triton", **options):
    """headstats.attend where Triton can run, its result on the CPU. Other backends run there altogether."""
    device = DEVICE if backend in ("triton", "auto") else "cpu"
    r = headstats.attend(*moved((q, k, v), device), **moved(options, device), backend=backend)
    return moved(r, "cpu")


def shapes(*small):
    """(queries, keys) that take several tiles: those of the interpreter are small, as it is slow."""
    return tuple((8 * m + 1, 8 * n + 1) for m, n in small) if ON_GPU else small
