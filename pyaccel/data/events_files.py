"""Readers of event recordings, one a format. Every error names the file, and the byte where it went wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .events import Events
from .events_mat import read_stmnist
from .readers import NpzFile

Source = str | os.PathLike
Sensor = tuple[int, int] | None  # (height, width) in pixels

NMNIST = (34, 34)
DVS128 = (128, 128)
OVERFLOW_ROW, OVERFLOW_US = 240, 1 << 13  # an "event" in this row is none: all later times are so much later
DAT_EVENT_BYTES = 8
DAT_EVENT_TYPES = (0, 12)  # Event2d, EventCD
AEDAT_EVENT_BYTES = 8


def read_nmnist(file: Source, sensor: Sensor = None) -> Events:
    """N-MNIST's `.bin`, also named `.bs2`, and N-Caltech101's: five bytes an event, no header.

    Bits from the highest: 8 column, 8 row, 1 polarity, 23 time in microseconds, big-endian. Row 240 marks that the
    recorder's clock ran over: no event, and 8192 us more for all that follow (as the readers of the data set's
    author do; no recording at hand has one). sensor: (height, width), 34 x 34 by default.
    FileNotFoundError; ValueError for a file that is not whole events, or with an event outside the sensor.
    """
    raw = _bytes(file)
    whole = len(raw) // 5 * 5
    if whole != len(raw):
        raise ValueError(f"{file}: truncated at byte {whole}: expected whole events of 5 bytes, got {len(raw) - whole} "
                         f"more bytes after {whole // 5} events")
    x, y, high, middle, low = raw.reshape(-1, 5).T
    t = (high & 0x7F).astype(np.int32) << 16 | middle.astype(np.int32) << 8 | low
    p = high >> 7
    overflow = y == OVERFLOW_ROW
    height, width = sensor or NMNIST
    if height <= OVERFLOW_ROW and overflow.any():
        t = (t + np.cumsum(overflow) * OVERFLOW_US)[~overflow]
        x, y, p = x[~overflow], y[~overflow], p[~overflow]
    return Events(x, y, p, t, height, width, str(file))


def read_dat(file: Source, sensor: Sensor = None) -> Events:
    """Prophesee's `.dat`: header lines that start with %, a byte each of event type and size, 8 bytes an event.

    An event, little-endian: 32 bits time in microseconds; 14 bits column, 14 bits row, 4 bits polarity. sensor:
    (height, width); None: what the header says. FileNotFoundError; ValueError for a header without sizes where none
    are given, another event type or size, a truncated file, events outside the sensor.
    """
    raw = _bytes(file)
    header, start = _header(raw, b"%")
    if len(raw) < start + 2:
        raise ValueError(f"{file}: truncated at byte {len(raw)}: expected event type and size at byte {start}, after "
                         f"the {len(header)} header lines")
    kind, size = int(raw[start]), int(raw[start + 1])
    if kind not in DAT_EVENT_TYPES or size != DAT_EVENT_BYTES:
        raise ValueError(f"{file}: byte {start}: expected events of type 0 (2D) or 12 (CD) and 8 bytes, got type "
                         f"{kind} of {size} bytes")
    words = _words(file, raw, start + 2, "<u4", DAT_EVENT_BYTES)
    if sensor is None:
        found = dict(re.findall(r"^% *(Width|Height) +(\d+)", "\n".join(header), re.MULTILINE))
        if len(found) < 2:
            raise ValueError(f"{file}: the header does not say Width and Height; give sensor=(height, width)")
        sensor = int(found["Height"]), int(found["Width"])
    t, place = words[:, 0].astype(np.int64), words[:, 1]
    x, y, p = ((place >> shift & mask).astype(np.uint16) for shift, mask in ((0, 0x3FFF), (14, 0x3FFF), (28, 0xF)))
    return Events(x, y, p, t, *sensor, str(file))


def read_aedat(file: Source, sensor: Sensor = None) -> Events:
    """AEDAT 2.0 of a DVS128 camera, as CIFAR10-DVS has it: header lines that start with #, then 8 bytes an event.

    An event, big-endian: 32 bits address (bit 0 polarity, bits 1-7 column, bits 8-14 row; bit 15 set: no event but
    an external signal, left out), 32 bits time in microseconds. Columns are mirrored (127 - x) and the polarity bit is
    inverted, as in the data set's own dat2mat. Written from the published description: no recording was at hand.
    FileNotFoundError; ValueError for another version of AEDAT, another camera, a truncated file.
    """
    raw = _bytes(file)
    version = bytes(raw[:14].tobytes()).split(b"\r")[0].split(b"\n")[0]
    if not version.startswith(b"#!AER-DAT2"):
        raise ValueError(f"{file}: byte 0: expected #!AER-DAT2.0, got {version[:14]!r}; other versions of AEDAT are "
                         "not read: convert the recording (iniVation's DV or the package aedat reads AEDAT 3 and 4) to "
                         ".npz with arrays x, y, p, t, height, width")
    if sensor not in (None, DVS128):
        raise ValueError(f"{file}: addresses of a DVS128 camera are read, 128 x 128; got sensor {sensor}")
    header, start = _header(raw, b"#")
    chips = [line for line in header if "AEChip:" in line and "DVS128" not in line.upper()]
    if chips:
        raise ValueError(f"{file}: expected a recording of a DVS128 camera, its header says {chips[0]!r}")
    words = _words(file, raw, start, ">u4", AEDAT_EVENT_BYTES)
    words = words[words[:, 0] >> 15 & 1 == 0]
    address, t = words[:, 0], words[:, 1].astype(np.int64)
    x, y = 127 - (address >> 1 & 0x7F).astype(np.int16), (address >> 8 & 0x7F).astype(np.int16)
    return Events(x, y, (1 - (address & 1)).astype(np.uint8), t, *DVS128, str(file))


def read_events_npz(file: Source, sensor: Sensor = None) -> Events:
    """A .npz file with arrays x, y, p, t (as in `Events`), and height and width where no sensor is given.

    FileNotFoundError; ValueError for a damaged file, pickled content, missing keys, wrong shapes or types.
    """
    arrays = NpzFile(Path(file))
    if sensor is None:
        if not {"height", "width"} <= set(arrays.keys):
            raise ValueError(f"{file}: expected the keys height and width beside x, y, p, t, or sensor=(height, "
                             f"width); got {', '.join(arrays.keys)}")
        sides = arrays["height"], arrays["width"]
        if any(side.size != 1 or side.dtype.kind not in "iu" for side in sides):
            raise ValueError(f"{file}: height and width must each be one integer, got {sides[0]!r} and {sides[1]!r}")
        sensor = sides[0].item(), sides[1].item()
    return Events(*(arrays[key] for key in "xypt"), *sensor, str(file))


READERS: dict[str, Callable[[Source, Sensor], Events]] = {
    ".bin": read_nmnist, ".bs2": read_nmnist, ".dat": read_dat, ".aedat": read_aedat, ".mat": read_stmnist,
    ".npz": read_events_npz,
}  # fmt: skip


def read_events(file: Source, sensor: Sensor = None) -> Events:
    """One recording, by the end of its name: .bin and .bs2, .dat, .aedat, .mat, .npz (see the reader of each).

    sensor: (height, width); None: what the file or its format says. ValueError for another name; what the readers
    raise.
    """
    suffix = Path(file).suffix.lower()
    if suffix == ".aedat4":
        raise ValueError(f"{file}: AEDAT 4 is compressed packets that need a package of their own; convert the "
                         "recording to .npz with arrays x, y, p, t, height, width (iniVation's dv-processing or the "
                         "package aedat)")
    if suffix not in READERS:
        raise ValueError(f"{file}: expected a recording named {' '.join(READERS)}")
    return READERS[suffix](file, sensor)


def _bytes(file: Source) -> np.ndarray:
    try:
        return np.fromfile(file, np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None


def _header(raw: np.ndarray, mark: bytes) -> tuple[list[str], int]:
    """The lines at the start that begin with `mark`, and the byte after them."""
    lines, start = [], 0
    data = raw[: 1 << 20].tobytes()
    while data[start:start + 1] == mark and (end := data.find(b"\n", start)) >= 0:
        lines.append(data[start:end].decode("latin-1").rstrip("\r"))
        start = end + 1
    return lines, start


def _words(file: Source, raw: np.ndarray, start: int, dtype: str, size: int) -> np.ndarray:
    """Events of two words each, [N, 2], from byte `start` to the end."""
    rest = (len(raw) - start) % size
    if rest:
        raise ValueError(f"{file}: truncated at byte {len(raw) - rest}: expected whole events of {size} bytes, got "
                         f"{rest} more bytes after {(len(raw) - start) // size} events")
    return raw[start:].view(dtype).reshape(-1, 2)
