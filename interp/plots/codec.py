"""Exact and compact arrays in JSON, for the page and for `Report.read`.

A packed array is ``{"dtype", "store", "shape", "data"}``. ``data`` holds the values as little-endian ``store``, the
smallest type that represents all of them exactly. Their bytes are ordered in planes (all first bytes, then all second
bytes, …), compressed by zlib, and written in base64. Planes compress well because neighbouring numbers share exponents.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError

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


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """Decode what `pack` made. Raises InterpError if the text is damaged."""
    try:
        store = np.dtype(packed["store"]).newbyteorder("<")
        planes = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"], validate=True)), np.uint8)
        raw = np.ascontiguousarray(planes.reshape(store.itemsize, -1).T).reshape(-1).view(store)
        return raw.reshape(packed["shape"]).astype(packed["dtype"])
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise InterpError(f"the numbers in this report are damaged: {error}") from None


def pack_dictionary(values: Sequence[Any] | pd.Series) -> dict[str, Any]:
    """Encode a column with few distinct values as a list and indices into it.

    Values are strings, integers or missing.
    """
    codes, distinct = pd.factorize(pd.Series(values), use_na_sentinel=False)
    values_list = [None if pd.isna(v) else v.item() if isinstance(v, np.generic) else v for v in distinct]
    return {"values": values_list, "index": pack(np.asarray(codes))}


def unpack_dictionary(packed: dict[str, Any], dtype: str) -> pd.Series:
    """Decode what `pack_dictionary` made into a pandas column of the given dtype."""
    try:
        values = pd.Series(packed["values"], dtype=dtype)
        return values.iloc[unpack(packed["index"])].reset_index(drop=True)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InterpError(f"the numbers in this report are damaged: {error}") from None
