"""Loading of the compiled library, after checks that it is whole and that nobody else could have written it."""

from __future__ import annotations

import ctypes
import logging
from ctypes import CDLL, POINTER, Structure, c_char_p, c_double, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

from headstats.cpu import build, trust

log = logging.getLogger("headstats")

KINDS = {"i": c_int64, "r": c_double, "p": c_void_p}
LEVELS = ("portable", "AVX2", "AVX-512")


class CompiledLibrary:
    """The loaded library. structure: the type of its argument.

    level: the index in LEVELS of the variant that runs.
    """

    def __init__(self, path: Path):
        library = CDLL(str(path))
        library.headstats_fields.restype = c_char_p
        fields = [x.split() for x in library.headstats_fields().decode().splitlines()]
        self.structure = type("CallStructure", (Structure,), {"_fields_": [(n, KINDS[kind]) for kind, n in fields]})
        self._attend = library.headstats_attend
        self._attend.argtypes, self._attend.restype = [POINTER(self.structure), c_int64, c_int64], c_int64
        library.headstats_level.restype = c_int64
        self.level = library.headstats_level()
        # The user can lower PyTorch's choice with ATEN_CPU_CAPABILITY; this backend follows it.
        limits = {"DEFAULT": 0, "NO AVX": 0, "AVX2": 1}
        self.level = min(self.level, limits.get(torch.backends.cpu.get_cpu_capability(), self.level))

    def attend(self, arguments: Structure) -> None:
        """Run a call. Other Python threads continue meanwhile."""
        if self._attend(ctypes.byref(arguments), self.level, torch.get_num_threads()):
            raise MemoryError("headstats: the compiled backend ran out of memory")


def check(path: Path) -> None:
    """Raise FileNotFoundError, PermissionError or DamagedFile unless a library may be loaded.

    Loading a torn library can end the process (SIGBUS), and a library runs with this user's rights.
    """
    for place in (path.parent.parent.resolve(), path.parent, path):
        if reason := trust.untrusted(place):
            raise PermissionError(reason)
    trust.check_seal(path)


def load(path: Path) -> CompiledLibrary:
    """Load a library that `build` has installed. Raises OSError, such as PermissionError or DamagedFile."""
    check(path)
    return CompiledLibrary(path)


@lru_cache(maxsize=1)
def find() -> tuple[CompiledLibrary | None, str]:
    """Return the library for these sources and this torch, or None and the reason.

    Searched once per process.
    """
    path = build.library_path()
    try:
        return load(path), ""
    except FileNotFoundError:
        return None, f"it is not built ({build.COMMAND} does that; nothing is at {path})"
    except trust.DamagedFile as error:
        reason = f"its library is not loaded: {error}; {build.COMMAND} builds it again"
        log.warning("headstats: the compiled backend is not used, and CPU calls are slower. %s", reason)
        return None, reason
    except OSError as error:
        return None, f"its library is not loaded: {error}"
