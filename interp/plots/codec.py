"""Exact and compact arrays in JSON, for the page and for `Report.read`.

A packed array is ``{"dtype", "store", "shape", "data"}``. ``data`` holds the values as little-endian ``store``, the
smallest type that represents all of them exactly. Their bytes are ordered in planes (all first bytes, then all second
bytes, …), compressed by zlib, and written in base64. Planes compress well because neighbouring numbers share exponents.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError
from interp.utils.damage import Budget

DTYPE = re.compile("bool|u?int(8|16|32|64)|float(16|32|64)")  # of a packed array
STORES = ("uint8", "uint16", "int32", "float32", "float64")  # types that a browser has typed arrays for


def pack(array: np.ndarray) -> dict[str, Any]:
    """Encode a numeric array; `unpack` returns the same values, shape and dtype."""
    store = next((s for s in STORES if _is_exact(array, s)), None)
    if store is None:
        raise InterpError(f"cannot store {array.dtype} values exactly in a report; convert them to float64 first")
    raw = np.ascontiguousarray(array.astype(np.dtype(store).newbyteorder("<"))).reshape(-1)
    planes = raw.view(np.uint8).reshape(raw.size, raw.itemsize).T
    data = base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode("ascii")
    return {"dtype": str(array.dtype), "store": store, "shape": list(array.shape), "data": data}


def _is_exact(array: np.ndarray, store: str) -> bool:
    """Whether ``store`` represents every value of the array exactly."""
    if array.dtype.kind == "f":
        if not store.startswith("float"):
            return False
        with np.errstate(over="ignore"):
            return np.array_equal(array.astype(store).astype(array.dtype), array, equal_nan=True)
    if array.dtype.kind not in "iub":
        return False
    # Values are compared as Python integers: int64 would wrap around, and floats lose integers above 2**53.
    with np.errstate(invalid="ignore"):
        return bool((array.astype(store).astype(object) == array.astype(object)).all()) if array.size else True


def unpack(packed: dict[str, Any], budget: Budget | None = None) -> np.ndarray:
    """Decode what `pack` made.

    Sizes are taken from ``budget`` before anything is allocated. Raises InterpError if the text is damaged, or if the
    budget does not suffice.
    """
    try:
        if packed["store"] not in STORES or not DTYPE.fullmatch(packed["dtype"]):
            raise ValueError(f"type {packed['dtype']!r:.40} stored as {packed['store']!r:.40}")
        store, dtype = np.dtype(packed["store"]).newbyteorder("<"), np.dtype(packed["dtype"])
        shape = packed["shape"]
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"shape {shape!r:.40}")
        n_values = math.prod(shape)
        if budget is not None:
            budget.take(n_values * (2 * store.itemsize + dtype.itemsize))
        planes = np.frombuffer(
            inflate(base64.b64decode(packed["data"], validate=True), n_values * store.itemsize), np.uint8
        )
        raw = np.ascontiguousarray(planes.reshape(store.itemsize, -1).T).reshape(-1).view(store)
        return raw.reshape(shape).astype(dtype)
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error) as error:
        if isinstance(error, InterpError):
            raise
        raise InterpError(f"the numbers in this report are damaged: {error}") from None


def inflate(packed: bytes, n_bytes: int) -> bytes:
    """Decompress zlib data that must hold exactly ``n_bytes``.

    Raises ValueError or zlib.error otherwise, without unpacking more than that.
    """
    stream = zlib.decompressobj()
    content = stream.decompress(packed, n_bytes + 1)
    if len(content) != n_bytes or not stream.eof:
        raise ValueError(f"{n_bytes:,} bytes expected, which the packed data do not hold")
    return content


def pack_dictionary(values: Sequence[Any] | pd.Series) -> dict[str, Any]:
    """Encode a column with few distinct values as a list and indices into it.

    Values are strings, integers or missing.
    """
    codes, distinct = pd.factorize(pd.Series(values), use_na_sentinel=False)
    values_list = [None if pd.isna(v) else v.item() if isinstance(v, np.generic) else v for v in distinct]
    return {"values": values_list, "index": pack(np.asarray(codes))}


def unpack_dictionary(packed: dict[str, Any], dtype: str, budget: Budget | None = None) -> pd.Series:
    """Decode what `pack_dictionary` made into a pandas column of the given dtype.

    Raises InterpError as `unpack` does.
    """
    index = unpack(packed["index"], budget)
    try:
        values = pd.Series(packed["values"], dtype=dtype)
        if index.size and (index.ndim != 1 or index.dtype.kind not in "iu" or index.min() < 0):
            raise ValueError(f"indices of type {index.dtype} and shape {index.shape}")
        if budget is not None:
            lengths = np.array([len(v) if isinstance(v, str) else 0 for v in packed["values"]], dtype=np.int64)
            budget.take(16 * len(index) + int(lengths[index].sum()))
        return values.iloc[index].reset_index(drop=True)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InterpError):
            raise
        raise InterpError(f"the numbers in this report are damaged: {error}") from None
