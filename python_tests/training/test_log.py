from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch

from pyaccel.training import RunLog


def events(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def write(folder, epochs, start=0):
    with RunLog(folder) as log:
        if start:
            log.truncate(start * 10, start)
        for epoch in range(start + 1, epochs + 1):
            log.event("step", step=epoch * 10 - 5, epoch=epoch - 1, loss=epoch / 3)
            row = {"epoch": epoch, "step": epoch * 10, "loss": 1 / epoch}
            log.metrics(row if epoch % 2 else row | {"eval, \"top\"": epoch / 7})
    return log


def test_events_are_lines_of_strict_json(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("start", step=0, epoch=0, config={"a": (1, torch.tensor(2.5)), "b": float("nan")}, path=tmp_path,
                  rate=np.float32(0.5))
        assert len(events(tmp_path)) == 1  # Flushed at once.
    (record,) = events(tmp_path)
    assert record.pop("time") > 1e9
    assert record == {"event": "start", "step": 0, "epoch": 0, "config": {"a": [1, 2.5], "b": "nan"}, "rate": 0.5,
                      "path": str(tmp_path)}


def test_columns_grow(tmp_path):
    log = write(tmp_path, 3)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == 'epoch,step,loss,"eval, ""top"""'
    assert lines[1:] == ["1,10,1.0,", "2,20,0.5,0.2857142857142857", "3,30,0.3333333333333333,"]
    with RunLog(tmp_path) as again:  # What is read back is what was written, bit for bit.
        assert again.rows == log.rows and again.columns == log.columns
        again.metrics({"epoch": 4, "step": 40, "late": None})
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].endswith(",late") and lines[1] == "1,10,1.0,," and lines[-1] == "4,40,,,"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "metrics.csv"]


@pytest.mark.parametrize("resumed", [1, 2, 3])
def test_truncation_leaves_what_an_undisturbed_run_leaves(tmp_path, resumed):
    write(tmp_path / "whole", 4)
    write(tmp_path / "killed", 3)
    for name in ("log.jsonl", "metrics.csv"):  # The kill came while a line was being written.
        with open(tmp_path / "killed" / name, "a") as file:
            file.write('{"event": "met' if name == "log.jsonl" else "4,4")
    write(tmp_path / "killed", 4, start=resumed)
    whole, killed = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "killed"))
    assert killed == whole
    whole, killed = ([{**record, "time": 0} for record in events(tmp_path / name)] for name in ("whole", "killed"))
    assert killed == whole


def test_without_truncation_the_log_differs(tmp_path):
    write(tmp_path, 3)
    with RunLog(tmp_path) as log:
        log.metrics({"epoch": 3, "step": 30, "loss": 0.0})
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 5


def test_an_epoch_that_ended_at_the_same_step_is_later_than_the_checkpoint(tmp_path):
    write(tmp_path, 2)
    with RunLog(tmp_path) as log:
        log.truncate(20, 1)
        assert [row["epoch"] for row in log.rows] == [1]
        log.truncate(0, 0)
        assert log.rows == [] and log.columns == []
    assert (tmp_path / "metrics.csv").read_text() == ""
    assert events(tmp_path) == []


def test_torn_line_is_dropped_when_opened(tmp_path):
    write(tmp_path, 2)
    before = events(tmp_path)
    for name, line in (("metrics.csv", "3,30,0."), ("log.jsonl", '{"event": "me')):
        with open(tmp_path / name, "a") as file:
            file.write(line)
    with RunLog(tmp_path) as log:
        assert [row["epoch"] for row in log.rows] == [1, 2]
        log.event("next", step=21, epoch=2)
    assert events(tmp_path)[:-1] == before and events(tmp_path)[-1]["event"] == "next"


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path / "run", rank=1, tensorboard=True) as log:
        log.event("start", step=0, epoch=0)
        log.metrics({"step": 1, "epoch": 1})
        log.truncate(0, 0)
        log.sync()
        assert log.rows == []
    assert not (tmp_path / "run").exists()


def test_tensorboard_mirror(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *args):
            written.append(args)

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with RunLog(tmp_path, tensorboard=True) as log:
        log.metrics({"epoch": 1, "step": 10, "loss": 0.5, "name": "x"})
    assert written == [(str(tmp_path / "tensorboard"), 10), ("epoch", 1, 10), ("loss", 0.5, 10), "closed"]


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path, tensorboard=True) as log:
        with pytest.warns(UserWarning, match=r'pip install "pyaccel\[log\]"') as caught:
            log.metrics({"epoch": 1, "step": 10})
            log.metrics({"epoch": 2, "step": 20})
        assert len(caught) == 1
