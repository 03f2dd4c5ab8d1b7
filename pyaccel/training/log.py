"""The log of a run: `log.jsonl`, one object an event, and `metrics.csv`, one row an epoch or evaluation."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .durable import replace_text

EVENTS, METRICS = "log.jsonl", "metrics.csv"

TIME_COLUMNS = ("seconds", "samples_per_second", "memory_mb")
"""Columns that differ between two runs of the same configuration; all others repeat bit for bit."""


class RunLog:
    """Appends to the log in `folder`. Ranks other than 0 write nothing.

    Every record holds `step`, the steps finished by then, and `epoch`, the epochs finished by then: `truncate` takes
    the log back to a checkpoint, so that a killed and resumed run leaves what an undisturbed one leaves.
    tensorboard: mirror the rows into `folder/tensorboard`, where the package is installed.
    """

    def __init__(self, folder: str | os.PathLike, *, rank: int = 0, tensorboard: bool = False):
        self.folder = Path(folder)
        self.columns: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._writes = rank == 0
        self._tensorboard = tensorboard and self._writes
        self._writer = None
        if not self._writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.folder / EVENTS)
        _drop_torn_line(self.folder / METRICS)
        self._events = open(self.folder / EVENTS, "a", encoding="utf-8")
        if (self.folder / METRICS).exists():
            with open(self.folder / METRICS, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or ())
                self.rows = [{name: _parse(text) for name, text in row.items() if text} for row in reader]

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def event(self, name: str, /, *, step: int, epoch: int, **fields: Any) -> None:
        """Append one line to log.jsonl; tensors and numpy numbers become Python's, nan and inf become strings."""
        if self._writes:
            record = {"event": name, "time": round(time.time(), 3), "step": step, "epoch": epoch}
            record.update((key, _jsonable(value)) for key, value in fields.items())
            self._events.write(json.dumps(record, allow_nan=False) + "\n")
            self._events.flush()

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row, with `step` and `epoch` in it, to metrics.csv and log.jsonl. New columns extend the header."""
        if not self._writes:
            return
        row = {name: _number(value) for name, value in row.items()}
        self.event("metrics", **row)
        self.rows.append({name: value for name, value in row.items() if value is not None})
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._rewrite_metrics()
        else:
            with open(self.folder / METRICS, "a", encoding="utf-8", newline="") as file:
                file.write(self._csv([row]))
        self._mirror(row)

    def truncate(self, step: int, epoch: int) -> None:
        """Remove what was written after `step` steps or `epoch` epochs were finished, and columns only that filled."""
        if not self._writes:
            return
        self._events.close()
        kept = [line for line in (self.folder / EVENTS).read_text(encoding="utf-8").splitlines(keepends=True)
                if _is_within(_record(line), step, epoch)]
        replace_text(self.folder / EVENTS, "".join(kept))
        self._events = open(self.folder / EVENTS, "a", encoding="utf-8")
        self.rows = [row for row in self.rows if _is_within(row, step, epoch)]
        self.columns = [name for name in self.columns if any(name in row for row in self.rows)]
        if (self.folder / METRICS).exists():
            self._rewrite_metrics()

    def sync(self) -> None:
        """Wait until the log is on the disk: called before a checkpoint, whose log it then holds."""
        if self._writes:
            os.fsync(self._events.fileno())
            if (self.folder / METRICS).exists():
                with open(self.folder / METRICS, "rb+") as file:
                    os.fsync(file.fileno())

    def close(self) -> None:
        if self._writes:
            self._events.close()
        if self._writer is not None:
            self._writer.close()

    def _rewrite_metrics(self) -> None:
        header = self._csv([{name: name for name in self.columns}]) if self.columns else ""
        replace_text(self.folder / METRICS, header + self._csv(self.rows))

    def _csv(self, rows: list[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue()

    def _mirror(self, row: Mapping[str, Any]) -> None:
        if self._tensorboard and self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                warnings.warn('TensorBoard is not installed, its log is left out; pip install "pyaccel[log]"',
                              stacklevel=3)
                self._tensorboard = False
                return
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=row["step"])
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, row["step"])
            self._writer.flush()


def _drop_torn_line(path: Path) -> None:
    """Cut what a kill left of a line half written."""
    if path.exists():
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _is_within(record: Mapping[str, Any], step: int, epoch: int) -> bool:
    return record.get("step", math.inf) <= step and record.get("epoch", math.inf) <= epoch


def _record(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}  # A damaged line has no place in the run, so it counts as too late.


def _number(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, bool) else value


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _parse(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
