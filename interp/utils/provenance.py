"""What made a number: package versions, code version, a hash of the prompts, the time."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any

PACKAGES = ("interp", "torch", "transformer-lens", "transformers", "triton", "numpy", "pandas")


def versions() -> dict[str, str]:
    """Versions of the packages a number depends on, and of Python: those this process began with."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def prompt_hash(items: Iterable[Any]) -> str:
    """A short hash of prompts (dataclasses or strings), order included."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        fields = vars(item) if hasattr(item, "__dict__") else item
        digest.update(json.dumps(fields, sort_keys=True, default=_content).encode())
    return digest.hexdigest()


def _content(x: Any) -> Any:
    """What JSON does not know, as what it does: of tensors all their numbers (their text form leaves some out)."""
    if hasattr(x, "detach"):
        return hashlib.blake2b(f"{tuple(x.shape)}".encode() + tensor_bytes(x), digest_size=8).hexdigest()
    return dict(x) if isinstance(x, Mapping) else str(x)


def tensor_bytes(tensor: Any) -> bytes:
    """Return a tensor's numbers as bytes, for hashing."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).contiguous().numpy().tobytes()


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def weights_hash(named: Iterable[tuple[str, Any]]) -> str:
    """A short hash over every weight's name, shape and up to 4,096 evenly spaced values."""
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in named:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)][:4096].float().cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy())
    return digest.hexdigest()
