"""Loading the compiled library, after checking who could have written it."""

from __future__ import annotations

import ctypes
from ctypes import CDLL, POINTER, Structure, c_char_p, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from headstats.cpu import build

KINDS = {"i": c_int64, "r": c_double, "p": c_void_p}
LEVELS = ("portable", "AVX2", "AVX-512")


class Library:
    """The loaded library. structure: its argument.  level: which of LEVELS runs."""

    def __init__(self, path: Path):
        library = CDLL(str(path))
        library.headstats_fields.restype = c_char_p
        fields = [x.split() for x in library.headstats_fields().decode().splitlines()]
        self.structure = type("CallStructure", (Structure,), {"_fields_": [(n, KINDS[kind]) for kind, n in fields]})
        self._attend = library.headstats_attend
        self._attend.argtypes, self._attend.restype = [POINTER(self.structure), c_int64, c_int64], c_int64
        library.headstats_level.restype = c_int64
        self.level = library.headstats_level()
        # PyTorch's choice can be lowered with ATEN_CPU_CAPABILITY; this follows it.
        lowered = {"DEFAULT": 0, "NO AVX": 0, "AVX2": 1}
        self.level = min(self.level, lowered.get(torch.backends.cpu.get_cpu_capability(), self.level))

    def attend(self, arguments: Structure) -> None:
        """Runs a call. Other Python threads go on meanwhile."""
        if self._attend(ctypes.byref(arguments), self.level, torch.get_num_threads()):
            raise MemoryError("headstats: the compiled backend ran out of memory")


def load(path: Path) -> Library:
    """Loads a library that `build` has put in place. Raises OSError or PermissionError."""
    for place in (path.parent.parent, path.parent, path):
        if reason := build.untrusted(place):
            raise PermissionError(reason)
    return Library(path)


@lru_cache(maxsize=1)
def find() -> tuple[Library | None, str]:
    """The library for these sources and this torch, or None and why. Looked for once in a process."""
    path = build.library_path()
    try:
        return load(path), ""
    except FileNotFoundError:
        return None, f"it is not built ({build.COMMAND} does that; nothing is at {path})"
    except OSError as error:
        return None, f"its library is not loaded: {error}"
