"""Events and their frames: nothing is lost, order of time, empty recordings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyaccel.data import Events, bin_events


def events(x, y, p, t, height=4, width=5):
    return Events(*(np.array(v, np.int64) for v in (x, y, p, t)), height, width)


@st.composite
def recordings(draw):
    n = draw(st.integers(0, 60))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    t = rng.integers(0, draw(st.integers(1, 10**6)), n) + draw(st.sampled_from([0, 5, 2**23, -7]))
    if draw(st.booleans()):
        t = np.sort(t)
    x, y, p = rng.integers(0, width, n), rng.integers(0, height, n), rng.integers(0, 2, n)
    kinds = (np.uint8, np.uint16, np.int64)
    x, y = x.astype(draw(st.sampled_from(kinds))), y.astype(draw(st.sampled_from(kinds)))
    return Events(x, y, p.astype(draw(st.sampled_from([np.uint8, np.bool_]))), t, height, width)


def slowly(e, steps, by):
    """The definition, event by event, in Python's integers."""
    frames = torch.zeros(steps, 2, e.height, e.width, dtype=torch.int32)
    order = sorted(range(len(e)), key=lambda i: int(e.t[i]))
    for rank, i in enumerate(order):
        first, last = int(e.t[order[0]]), int(e.t[order[-1]])
        frame = (int(e.t[i]) - first) * steps // (last - first + 1) if by == "time" else rank * steps // len(e)
        frames[frame, int(e.p[i]), int(e.y[i]), int(e.x[i])] += 1
    return frames


@settings(max_examples=150, deadline=None)
@given(recordings(), st.integers(1, 12), st.sampled_from(["time", "count"]))
def test_frames_are_the_definition_and_hold_every_event(e, steps, by):
    frames = bin_events(e, steps, by)
    assert frames.dtype is torch.int32 and frames.shape == (steps, 2, e.height, e.width)
    assert int(frames.sum()) == len(e)
    assert int(frames[:, 1].sum()) == int(e.p.sum())
    if by == "count":
        a_frame = frames.sum((1, 2, 3))
        assert int(a_frame.max() - a_frame.min()) <= 1
    assert torch.equal(frames, slowly(e, steps, by))


def test_time_and_count_differ_where_the_rate_does():
    e = events([0, 0, 0, 0], [0] * 4, [1] * 4, [0, 1, 2, 99])
    assert bin_events(e, 2).sum((1, 2, 3)).tolist() == [3, 1]
    assert bin_events(e, 2, "count").sum((1, 2, 3)).tolist() == [2, 2]


def test_channels_rows_and_columns_are_where_they_belong():
    frames = bin_events(events([4, 0], [1, 3], [0, 1], [10, 20]), 2)
    assert frames.nonzero().tolist() == [[0, 0, 1, 4], [1, 1, 3, 0]]


@pytest.mark.parametrize("by", ["time", "count"])
def test_an_empty_recording_has_empty_frames(by):
    e = events([], [], [], [])
    assert (len(e), e.duration) == (0, 0)
    assert bin_events(e, 3, by).shape == (3, 2, 4, 5) and bin_events(e, 3, by).sum() == 0


def test_one_event_and_simultaneous_events_are_in_the_first_window():
    assert bin_events(events([1], [1], [1], [7]), 4)[0, 1, 1, 1] == 1
    assert bin_events(events([1, 1], [1, 1], [1, 1], [7, 7]), 4)[0, 1, 1, 1] == 2


def test_mistakes_are_named():
    good = events([1, 2], [1, 2], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        bin_events(good, 0)
    with pytest.raises(ValueError, match="by must be one of time, count, got 'rate'"):
        bin_events(good, 2, "rate")
    with pytest.raises(ValueError, match=r"event 1 has x = 5, expected 0\.\.4 on a sensor of 4 rows of 5 pixels"):
        events([1, 5], [1, 2], [0, 1], [0, 1])
    with pytest.raises(ValueError, match=r"event 0 has y = -1"):
        events([1, 2], [-1, 2], [0, 1], [0, 1])
    with pytest.raises(ValueError, match=r"event 1 has p = 2, expected 0\.\.1"):
        events([1, 2], [1, 2], [0, 2], [0, 1])
    with pytest.raises(ValueError, match=r"one an event, got t of int64 \(3,\)"):
        events([1, 2], [1, 2], [0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="integers, one an event, got t of float64"):
        Events(*(np.zeros(1, np.uint8),) * 3, np.zeros(1), 4, 5)
    with pytest.raises(ValueError, match="at least one pixel, got 0 rows"):
        events([], [], [], [], height=0)
