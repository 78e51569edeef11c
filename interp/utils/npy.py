"""Headers of .npy files, checked against the size of the file before anything is allocated."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

MOST_HEADER = 65_536 + 12  # bytes; numpy itself writes 128 for a plain array


@dataclass(frozen=True)
class NpyHeader:
    """Shape and type of the array of a .npy file; its values begin at byte ``start``."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(head: bytes, size: int) -> NpyHeader:
    """Return the header of a .npy file of ``size`` bytes that begins with ``head``.

        header = read_npy_header(content[:MOST_HEADER], len(content))

    Raises ValueError unless the file holds plain numbers, in C order, and is exactly as long as its header says.
    Pickled objects are refused.
    """
    stream = io.BytesIO(head[:MOST_HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(stream)
    except Exception as error:  # numpy reads the header as Python, and passes on what its parser raises
        raise ValueError(f"its header cannot be read: {error!s:.100}") from None
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ValueError(f"plain numbers expected, got {dtype}; pickled objects are refused")
    if by_column and len(shape) > 1:
        raise ValueError("its values are stored column by column")
    header = NpyHeader(shape, dtype, stream.tell())
    if any(type(n) is not int or n < 0 for n in shape) or header.start + header.n_bytes != size:
        raise ValueError(f"{dtype} of shape {shape} expected, which the {size} bytes of the file do not hold")
    return header


def read_npy(content: bytes) -> Shaped[np.ndarray, "*shape"]:
    """Return the array of the bytes of a .npy file. ValueError as for `read_npy_header`."""
    header = read_npy_header(content, len(content))
    return np.frombuffer(content, header.dtype, offset=header.start).reshape(header.shape).copy()
