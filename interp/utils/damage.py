"""Read files that may be damaged, or made to do harm: one clear message, and memory in proportion to the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from interp.errors import InterpError

FLOOR = 2**27  # bytes that any file may unpack to


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into an InterpError with the file's name.

    with reading(path):
        table = pq.read_table(path)
    """
    try:
        yield
    except InterpError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None
    except FileNotFoundError:
        raise InterpError(f"{path} does not exist") from None
    except MemoryError as error:
        raise InterpError(f"{path} is damaged, or needs more memory than there is: {error!s:.200}") from None
    except OSError as error:
        raise InterpError(f"{path} cannot be read: {error.strerror or str(error)[:300]}") from None
    except Exception as error:
        raise InterpError(f"{path} is damaged ({type(error).__name__}: {error!s:.200})") from None


class Budget:
    """Bytes that the contents of one file may take in memory.

    These are `FLOOR` and ``times`` the size of the file, or ``most``.

    Sizes that a file names are taken from the budget before anything is allocated. Without it, a page of one MB could
    name an array of many GB.

        budget = Budget("page.html", n_bytes=1_400_000, times=64)
        budget.take(8 * 1000)
    """

    def __init__(self, name: str | os.PathLike[str], n_bytes: int, times: int, most: int | None = None):
        self.name, self.n_bytes = str(name), n_bytes
        self.most = FLOOR + times * n_bytes if most is None else most
        self.left = self.most

    def take(self, n_bytes: int) -> None:
        """Subtract bytes that are about to be allocated. InterpError if they are not left."""
        if n_bytes < 0 or n_bytes > self.left:
            raise InterpError(
                f"{self.name} is damaged or hostile: it has {self.n_bytes:,} bytes, and its contents would take more "
                f"than {self.most / 2**20:,.0f} MiB of memory. If you trust it, read it with a larger max_bytes"
            )
        self.left -= n_bytes
