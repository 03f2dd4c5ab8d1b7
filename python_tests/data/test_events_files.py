"""The readers of event recordings: files written here byte by byte, real ones where they are at hand, damaged ones."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyaccel.data import read_aedat, read_dat, read_events, read_events_npz, read_nmnist, read_stmnist

XYPT = [(0, 0, 0, 0), (33, 2, 1, 5), (7, 33, 1, 70_000), (1, 1, 0, 8_388_607)]


def nmnist_bytes(rows) -> bytes:
    return b"".join(struct.pack(">Q", x << 32 | y << 24 | p << 23 | t)[3:] for x, y, p, t in rows)


def dat_bytes(rows, header="% Data file containing CD\n% Version 2\n% Width 640\n% Height 480\n", kind=12, size=8):
    return (header.encode() + bytes([kind, size])
            + b"".join(struct.pack("<II", t, x | y << 14 | p << 28) for x, y, p, t in rows))  # fmt: skip


def aedat_bytes(rows, header="#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n") -> bytes:
    """As DVS128 sends it: columns mirrored, the polarity bit 0 for ON (the data set's dat2mat)."""
    return header.encode() + b"".join(struct.pack(">II", y << 8 | (127 - x) << 1 | 1 - p, t) for x, y, p, t in rows)


def mat_bytes(matrix, name=b"spiketrain", compressed=True, kind=9) -> bytes:
    def element(code, content):
        return struct.pack("<II", code, len(content)) + content + b"\0" * (-len(content) % 8)

    inner = element(6, struct.pack("<II", 6, 0)) + element(5, struct.pack("<ii", *matrix.shape)) + element(1, name)
    inner += element(kind, np.asfortranarray(matrix).tobytes(order="F"))
    whole = element(14, inner)
    if compressed:
        packed = zlib.compress(whole)
        whole = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + whole


def found(events):
    return list(zip(events.x.tolist(), events.y.tolist(), events.p.tolist(), events.t.tolist(), strict=True))


@pytest.fixture
def file(tmp_path):
    def write(name, content: bytes):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.mark.parametrize("suffix", ["bin", "bs2"])
def test_nmnist(file, suffix):
    e = read_events(file(f"a.{suffix}", nmnist_bytes(XYPT)))
    assert found(e) == XYPT and (e.height, e.width) == (34, 34)
    assert len(read_nmnist(file("empty.bin", b""))) == 0


def test_nmnist_clock_overflow_is_no_event_and_shifts_what_follows(file):
    rows = [(1, 1, 1, 10), (0, 240, 0, 0), (2, 2, 0, 20), (0, 240, 1, 0), (3, 3, 1, 30)]
    e = read_nmnist(file("a.bin", nmnist_bytes(rows)))
    assert found(e) == [(1, 1, 1, 10), (2, 2, 0, 20 + 8192), (3, 3, 1, 30 + 2 * 8192)]
    tall = read_nmnist(file("a.bin", nmnist_bytes(rows)), sensor=(241, 34))  # there it is a row like any other
    assert found(tall) == rows


def test_dat(file):
    rows = [(639, 479, 1, 0), (0, 0, 0, 2**31), (5, 6, 1, 2**32 - 1)]
    e = read_events(file("a.dat", dat_bytes(rows)))
    assert found(e) == rows and (e.height, e.width) == (480, 640)
    old = file("b.dat", dat_bytes(rows, header="% Data file containing Event2d events\n", kind=0))
    assert found(read_dat(old, sensor=(480, 640))) == rows
    with pytest.raises(ValueError, match=r"b\.dat: the header does not say Width and Height; give sensor"):
        read_dat(old)


def test_aedat(file):
    rows = [(0, 0, 1, 1), (127, 0, 0, 2), (5, 127, 1, 2**31 + 3)]
    e = read_events(file("a.aedat", aedat_bytes(rows)))
    assert found(e) == rows and (e.height, e.width) == (128, 128)
    external = aedat_bytes(rows) + struct.pack(">II", 1 << 15 | 3 << 8, 9)
    assert found(read_aedat(file("b.aedat", external))) == rows
    assert len(read_aedat(file("c.aedat", aedat_bytes([])))) == 0


@pytest.mark.parametrize("compressed", [True, False])
def test_stmnist(file, compressed):
    matrix = np.zeros((101, 3))
    matrix[100] = 0.25, 0.5, 0.75
    matrix[12, 0], matrix[99, 0], matrix[0, 2] = 1, -1, -1
    e = read_events(file("a.mat", mat_bytes(matrix, compressed=compressed)))
    assert found(e) == [(2, 1, 1, 250_000), (9, 9, 0, 250_000), (0, 0, 0, 750_000)]
    assert (e.height, e.width) == (10, 10)


def test_npz(file, tmp_path):
    x, y, p, t = (np.array(v) for v in zip(*XYPT, strict=True))
    np.savez(tmp_path / "a.npz", x=x, y=y, p=p, t=t, height=34, width=40)
    e = read_events(tmp_path / "a.npz")
    assert found(e) == XYPT and (e.height, e.width) == (34, 40)
    np.savez(tmp_path / "b.npz", x=x, y=y, p=p, t=t)
    assert found(read_events_npz(tmp_path / "b.npz", sensor=(34, 34))) == XYPT
    with pytest.raises(ValueError, match=r"b\.npz: expected the keys height and width beside x, y, p, t"):
        read_events(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", x=x, y=y, p=p, t=t, height=[34, 34], width=34)
    with pytest.raises(ValueError, match=r"b\.npz: height and width must each be one integer, got array\(\[34, 34\]\)"):
        read_events(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", x=x, y=y, t=t, height=34, width=34)
    with pytest.raises(ValueError, match=r"c\.npz: expected the key p"):
        read_events(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", x=x.astype(object), y=y, p=p, t=t, height=34, width=34)
    with pytest.raises(ValueError, match=r"d\.npz: not a sound \.npz"):
        read_events(tmp_path / "d.npz")


DAMAGED = {
    "a.bin": (nmnist_bytes(XYPT)[:-2], r"truncated at byte 15: expected whole events of 5 bytes, got 3 more bytes"),
    "b.bin": (nmnist_bytes([(0, 0, 0, 0), (34, 0, 0, 1)]), r"event 1 has x = 34, expected 0\.\.33"),
    "a.dat": (dat_bytes(XYPT)[:-1], r"truncated at byte \d+: expected whole events of 8 bytes, got 7 more bytes"),
    "b.dat": (b"% Version 2\n", "truncated at byte 12: expected event type and size at byte 12, after the 1 header"),
    "c.dat": (dat_bytes(XYPT, kind=14), "expected events of type 0 .* got type 14 of 8 bytes"),
    "d.dat": (dat_bytes(XYPT, size=16), "got type 12 of 16 bytes"),
    "e.dat": (dat_bytes([(640, 0, 0, 0)]), "event 0 has x = 640"),
    "f.dat": (b"", "truncated at byte 0"),
    "a.aedat": (aedat_bytes([(1, 1, 1, 1)])[:-3], "truncated at byte .*: expected whole events of 8 bytes, got 5 more"),
    "b.aedat": (aedat_bytes([], header="#!AER-DAT3.1\r\n"), "byte 0: expected #!AER-DAT2.0, got b'#!AER-DAT3.1'"),
    "c.aedat": (b"\0" * 16, "byte 0: expected #!AER-DAT2.0"),
    "d.aedat": (aedat_bytes([], header="#!AER-DAT2.0\n# AEChip: seebetter.davis.Davis640\n"), "DVS128 camera"),
    "a.aedat4": (b"#!AER-DAT4.0\r\n", "convert the recording to .npz"),
    "a.mat": (mat_bytes(np.zeros((101, 2)))[:-9], "truncated or damaged in the data element at byte 128"),
    "b.mat": (b"MATLAB 7.3 MAT-file".ljust(200), "byte 0: expected a little-endian MATLAB file of version 5"),
    "c.mat": (mat_bytes(np.zeros((100, 2))), r"expected spiketrain \[101, N\], got \[100, 2\]"),
    "d.mat": (mat_bytes(np.zeros((101, 2)), name=b"other"), "a matrix of numbers named spiketrain, got b'other'"),
    "e.mat": (mat_bytes(np.full((101, 2), 3.0)), "expected entries -1, 0, 1"),
    "f.mat": (mat_bytes(np.zeros((101, 2)), compressed=False)[:200], "byte .*: expected .* bytes of content, got"),
    "a.npz": (b"PK not really", "not a sound .npz"),
    "a.txt": (b"1 2 3", "expected a recording named .bin .bs2 .dat .aedat .mat .npz"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named_with_the_byte(file, name):
    content, text = DAMAGED[name]
    path = file(name, content)
    with pytest.raises(ValueError, match=text) as error:
        read_events(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("suffix", ["bin", "dat", "aedat", "mat", "npz"])
def test_a_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"missing.{suffix}: no such file"):
        read_events(tmp_path / f"missing.{suffix}")


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Real recordings, one a format; skips where they are not at hand."""
    home = Path(os.environ.get("PYACCEL_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (home / "event_formats.zip").exists():
        pytest.skip(f"no event_formats.zip in {home}; set PYACCEL_TEST_DATA")
    folder = tmp_path_factory.mktemp("recordings")
    zipfile.ZipFile(home / "event_formats.zip").extractall(folder)
    return {file.name: file for file in folder.rglob("*.*")}


def test_real_recordings(real):
    sizes = {"sample_nmnist.bin": 4325, "nmnist_1.bs2": 4681, "sample_stmnist.mat": 2346}
    for name, count in sizes.items():
        e = read_events(real[name])
        assert len(e) == count and (np.diff(e.t) >= 0).all(), name
        assert 0.4 < e.p.mean() < 0.7, name
        assert 0.2e6 < e.duration < 1e6, name
        assert e.x.max() >= e.width - 1 and e.y.max() >= e.height - 2, name  # the whole sensor is used
    cars = read_dat(real["sample_ncars.dat"], sensor=(100, 120))
    assert len(cars) == 2009 and (np.diff(cars.t) >= 0).all() and 90_000 < cars.duration <= 100_000


def test_real_stmnist_agrees_with_scipy(real):
    scipy = pytest.importorskip("scipy.io")
    matrix = scipy.loadmat(real["sample_stmnist.mat"])["spiketrain"]
    e = read_stmnist(real["sample_stmnist.mat"])
    assert len(e) == np.count_nonzero(matrix[:-1])
    again = np.zeros_like(matrix[:-1])
    columns = np.searchsorted(np.rint(matrix[-1] * 1e6), e.t)
    again[e.y.astype(int) * 10 + e.x, columns] = np.where(e.p, 1, -1)
    assert np.count_nonzero(again) == len(set(zip(e.x.tolist(), e.y.tolist(), columns.tolist(), strict=True)))


rows_of = st.lists(st.tuples(st.integers(0, 33), st.integers(0, 33), st.integers(0, 1), st.integers(0, 2**23 - 1)))


@settings(max_examples=100, deadline=None)
@given(rows_of)
def test_what_is_written_is_read(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    for suffix, encode in (("bin", nmnist_bytes), ("dat", dat_bytes), ("aedat", aedat_bytes)):
        (folder / f"rows.{suffix}").write_bytes(encode(rows))
        assert found(read_events(folder / f"rows.{suffix}")) == rows


STARTS = {"bin": b"", "dat": b"% Width 64\n% Height 64\n\x0c\x08", "aedat": b"#!AER-DAT2.0\r\n", "npz": b"PK\x03\x04",
          "mat": mat_bytes(np.eye(101, 3))}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(STARTS)), st.binary(max_size=200), st.integers(0, 400), st.booleans())
def test_any_bytes_are_events_or_a_value_error_that_names_the_file(tmp_path_factory, suffix, noise, place, cut):
    """Noise behind a sound start, in the middle of it, or in place of its end."""
    start = STARTS[suffix]
    content = start[:place] + noise + (b"" if cut else start[place:])
    path = tmp_path_factory.getbasetemp() / f"noise.{suffix}"
    path.write_bytes(content)
    try:
        events = read_events(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert len(events.t) == len(events.x) == len(events)
