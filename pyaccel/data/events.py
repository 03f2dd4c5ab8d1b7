"""Recordings of event cameras: what happened at which pixel and when, and its frames, one for each time step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINNINGS = ("time", "count")


@dataclass(frozen=True)
class Events:
    """One recording: event i happened at column x[i], row y[i], with polarity p[i], at time t[i].

    x, y: integers [N], 0..width-1 and 0..height-1. p: integers or booleans [N], 0 (OFF, darker) or 1 (ON, brighter).
    t: integers [N], microseconds. height, width: of the sensor, in pixels. where: what errors call it.
    ValueError for arrays of other shapes or types, and for an event outside the sensor or of another polarity.
    """

    x: np.ndarray
    y: np.ndarray
    p: np.ndarray
    t: np.ndarray
    height: int
    width: int
    where: str = "events"

    def __post_init__(self):
        if self.height < 1 or self.width < 1:
            raise ValueError(f"{self.where}: a sensor has at least one pixel, got {self.height} rows of {self.width}")
        for name, most in (("x", self.width), ("y", self.height), ("p", 2), ("t", None)):
            values = getattr(self, name)
            if values.ndim != 1 or values.dtype.kind not in "iub" or values.shape != self.x.shape:
                raise ValueError(f"{self.where}: x, y, p, t must be integers, one an event, got {name} of "
                                 f"{values.dtype} {values.shape} beside x {self.x.shape}")
            if most is not None and values.size and not 0 <= int(values.min()) <= int(values.max()) < most:
                first = int(((values < 0) | (values >= most)).argmax())
                raise ValueError(f"{self.where}: event {first} has {name} = {int(values[first])}, expected "
                                 f"0..{most - 1} on a sensor of {self.height} rows of {self.width} pixels")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def duration(self) -> int:
        """Microseconds from the first event to the last; 0 for less than two events."""
        return int(self.t.max()) - int(self.t.min()) if len(self) else 0


def bin_events(events: Events, steps: int, by: str = "time") -> Tensor:
    """Counts of events: int32 `[steps, 2, height, width]`, channel 0 OFF and 1 ON; every event is in exactly one frame.

    by="time": `steps` windows of equal length from the first event to the last: frame (t - t_first) steps // (t_last -
    t_first + 1). by="count": equally many events a frame (to within one), in order of time: event i of n is in frame
    i steps // n. A recording without events has empty frames. ValueError for less than one step or an unknown `by`.
    """
    if steps < 1:
        raise ValueError(f"bin_events: steps must be at least 1, got {steps}")
    if by not in BINNINGS:
        raise ValueError(f"bin_events: by must be one of {', '.join(BINNINGS)}, got {by!r}")
    n, shape = len(events), (steps, 2, events.height, events.width)
    if n == 0:
        return torch.zeros(shape, dtype=torch.int32)
    time = events.t.astype(np.int64)
    if by == "time":
        frame = (time - time.min()) * steps // (int(time.max()) - int(time.min()) + 1)
    else:
        frame = np.arange(n) * steps // n
        if (time[1:] < time[:-1]).any():  # most recordings are in order
            frame[np.argsort(time, kind="stable")] = frame.copy()
    pixel = ((frame * 2 + events.p) * events.height + events.y) * events.width + events.x
    # A histogram: several times as fast as np.add.at, which adds one by one.
    counts = np.bincount(pixel, minlength=steps * 2 * events.height * events.width)
    return torch.from_numpy(counts.astype(np.int32)).view(shape)
