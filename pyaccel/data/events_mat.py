"""ST-MNIST's recordings of an artificial skin: MATLAB files (version 5), read without scipy."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np

from .events import Events

TAXELS = 10  # rows and columns of the skin
COMPRESSED, MATRIX, NAME = 15, 14, b"spiketrain"
# Types of MATLAB data elements that a matrix of numbers may be stored in.
NUMBERS = {1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}


def read_stmnist(file: str | os.PathLike, sensor: tuple[int, int] | None = None) -> Events:
    """ST-MNIST's `.mat`: a matrix `spiketrain` [101, N], 100 taxels and the time in seconds, entries -1, 0, 1.

    An entry 1 is an event of polarity 1, -1 one of polarity 0; taxel k is taken as row k // 10, column k % 10, which
    is this library's reading: the published description does not say. Times are rounded to microseconds.
    FileNotFoundError; ValueError for another file, a damaged one, another matrix.
    """
    if sensor not in (None, (TAXELS, TAXELS)):
        raise ValueError(f"{file}: a recording of ST-MNIST has {TAXELS} x {TAXELS} taxels, got sensor {sensor}")
    matrix = _matrix(file)
    if matrix.ndim != 2 or len(matrix) != TAXELS**2 + 1:
        raise ValueError(f"{file}: expected spiketrain [101, N], got {list(matrix.shape)}")
    entries, seconds = matrix[:-1], matrix[-1].astype(np.float64)
    if not np.isin(entries, (-1, 0, 1)).all() or not np.isfinite(seconds).all():
        raise ValueError(f"{file}: expected entries -1, 0, 1 and finite times in spiketrain")
    column, taxel = entries.T.nonzero()  # by time, then by taxel
    x, y = (taxel % TAXELS).astype(np.uint8), (taxel // TAXELS).astype(np.uint8)
    polarity = (entries[taxel, column] > 0).astype(np.uint8)
    return Events(x, y, polarity, np.rint(seconds[column] * 1e6).astype(np.int64), TAXELS, TAXELS, str(file))


def _matrix(file: str | os.PathLike) -> np.ndarray:
    """The first matrix of a MATLAB file of version 5, which must be `spiketrain`."""
    try:
        with open(file, "rb") as opened:
            data = opened.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    if len(data) < 136 or not data.startswith(b"MATLAB 5.0") or data[126:128] != b"IM":
        raise ValueError(f"{file}: byte 0: expected a little-endian MATLAB file of version 5, got {data[:10]!r} and "
                         f"{len(data)} bytes")
    try:
        kind, content, _ = _element(data, 128)
        if kind == COMPRESSED:
            kind, content, _ = _element(zlib.decompress(content), 0)
        if kind != MATRIX:
            raise ValueError(f"expected a matrix, got an element of type {kind}")
        _, _, place = _element(content, 0)  # its class and flags
        _, shape, place = _element(content, place)
        _, name, place = _element(content, place)
        kind, numbers, _ = _element(content, place)
        if name != NAME or kind not in NUMBERS:
            raise ValueError(f"expected a matrix of numbers named spiketrain, got {name!r} of type {kind}")
        return np.frombuffer(numbers, NUMBERS[kind]).reshape(np.frombuffer(shape, "<i4"), order="F")
    except (struct.error, zlib.error, ValueError) as error:
        raise ValueError(f"{file}: truncated or damaged in the data element at byte 128 ({error})") from error


def _element(data: bytes, start: int) -> tuple[int, bytes, int]:
    """Type, content and end of the data element at `start`: a tag of 8 bytes, or of 4 with up to 4 bytes of content."""
    kind, size = struct.unpack_from("<II", data, start)
    small = kind >> 16
    first = start + (4 if small else 8)
    if small:
        kind, size = kind & 0xFFFF, small
    if first + size > len(data):
        raise ValueError(f"byte {start}: expected {size} bytes of content, got {len(data) - first}")
    end = start + 8 if small else first + (size if kind == COMPRESSED else (size + 7) // 8 * 8)
    return kind, data[first:first + size], end
