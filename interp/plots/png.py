"""Eight-bit grey PNG, the one image format that a page decodes by itself and that holds numbers exactly."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from jaxtyping import UInt8

from interp.errors import InterpError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NONE, SUB, UP = 0, 1, 2  # how a line is written: itself, its change from the left, its change from the line above


def encode(image: UInt8[np.ndarray, "height width"]) -> str:
    """base64 of a PNG, by whichever filter makes it smallest."""
    height, width = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = min((zlib.compress(_filtered(image, kind), 9) for kind in (NONE, SUB, UP)), key=len)
    data = SIGNATURE + b"".join(_chunk(t, d) for t, d in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")))
    return base64.b64encode(data).decode("ascii")


def decode(text: str) -> UInt8[np.ndarray, "height width"]:
    """What `encode` was given. InterpError for anything that it did not write."""
    try:
        data = base64.b64decode(text, validate=True)
        width, height = struct.unpack(">II", data[16:24])
        size = struct.unpack(">I", data[33:37])[0]
        lines = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(height, width + 1)
    except (ValueError, struct.error, zlib.error) as error:
        raise InterpError(f"an image in this report is damaged: {error}") from None
    kind, image = int(lines[0, 0]) if height else NONE, lines[:, 1:]
    if kind == NONE:
        return image.copy()
    return np.cumsum(image, axis=1 if kind == SUB else 0, dtype=np.uint64).astype(np.uint8)


def _filtered(image: UInt8[np.ndarray, "height width"], kind: int) -> bytes:
    changed = image
    if kind != NONE:
        changed = np.diff(image, axis=1 if kind == SUB else 0, prepend=np.uint8(0))
    return np.concatenate([np.full((len(image), 1), kind, np.uint8), changed], axis=1).tobytes()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
