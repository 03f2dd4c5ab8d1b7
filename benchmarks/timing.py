"""Fair timing on a noisy machine: candidates take turns in one process, medians, CPU time of all threads beside wall time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Time:
    cpu: float  # seconds of all threads together; on a GPU the same as wall
    wall: float


def measure(jobs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Time]:
    """Median times of each job; the jobs are interleaved, in turn and in reverse, and each runs once untimed before."""
    samples: dict[str, list[Time]] = {name: [] for name in jobs}
    for k in range(rounds):
        order = list(jobs) if k % 2 == 0 else list(reversed(jobs))
        for name in order:
            jobs[name]()
            samples[name].append(_once(jobs[name], device))
    gc.collect()
    return {name: Time(median(s.cpu for s in found), median(s.wall for s in found)) for name, found in samples.items()}


def _once(job: Callable[[], object], device: torch.device) -> Time:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        job()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1e3
        return Time(seconds, seconds)
    cpu, wall = time.process_time(), time.perf_counter()
    job()
    return Time(time.process_time() - cpu, time.perf_counter() - wall)


def compiled(function: Callable, *example) -> tuple[Callable, float]:
    """`torch.compile` of a function and the seconds its first call (with backward where it has one) took."""
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    fast(*example)
    return fast, time.perf_counter() - start
