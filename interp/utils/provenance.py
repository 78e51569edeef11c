"""Provenance of a number: package versions, hashes, and the time."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("interp", "torch", "transformer-lens", "transformers", "triton", "numpy", "pandas")
SOURCES = (".py", ".cpp", ".cc", ".c", ".h", ".hpp", ".cu")  # of files that numbers depend on


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on.

    The versions are those at the first call.
    """
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


@cache
def code_hash() -> str:
    """Return interp's version and a short hash of its source files, and of headstats'.

    Two checkouts with the same version number but other code have another hash.
    """
    digest = hashlib.blake2b(digest_size=6)
    for package in ("interp", "headstats"):
        spec = find_spec(package)
        for folder in sorted(spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in SOURCES and path.is_file():
                    digest.update(f"{package}/{path.relative_to(folder).as_posix()}\n".encode())
                    digest.update(path.read_bytes())
    return f"{versions().get('interp', '')}+{digest.hexdigest()}"


def prompt_hash(items: Iterable[Any], ids: Iterable[Any]) -> str:
    """Return a short hash of prompts (dataclasses or strings) in their order, and of their token ids.

    ``ids``: of each prompt, what the model reads: token ids, or lists of them. Equal texts that a model reads with and
    without a BOS token are two prompts.
    """
    digest = hashlib.blake2b(digest_size=8)
    for item, read in zip(items, ids, strict=True):
        fields = vars(item) if hasattr(item, "__dict__") and not isinstance(item, tuple) else item
        if isinstance(fields, dict) and not fields.get("corrupt_spans", True):
            fields = {name: value for name, value in fields.items() if name != "corrupt_spans"}  # as before it existed
        digest.update(json.dumps([fields, read], sort_keys=True, default=_as_json).encode())
    return digest.hexdigest()


def _as_json(x: Any) -> Any:
    """Turn an object into something that JSON can hold.

    A tensor becomes a hash of all its numbers.

    (A tensor's text form omits some numbers.)
    """
    if hasattr(x, "detach"):
        return hashlib.blake2b(f"{tuple(x.shape)}".encode() + tensor_bytes(x), digest_size=8).hexdigest()
    return dict(x) if isinstance(x, Mapping) else str(x)


def tensor_bytes(tensor: Any) -> bytes:
    """Return a tensor's numbers as bytes, for hashing."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).contiguous().numpy().tobytes()


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def text_hash(text: str) -> str:
    """Return a short hash of a text, as long as that of weights."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def weights_hash(named: Iterable[tuple[str, Any]]) -> str:
    """Return a short hash of every weight's name, shape and up to 4,096 evenly spaced values of its whole length."""
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in named:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, math.ceil(flat.numel() / 4096))].float().cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy())
    return digest.hexdigest()
