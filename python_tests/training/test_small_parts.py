"""Averages, progress, signals, transfer: the small parts under the loop."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections import namedtuple

import pytest
import torch

from pyaccel.training import progress
from pyaccel.training.averages import Averages, FiniteCheck
from pyaccel.training.signals import stop_on_signals
from pyaccel.training.transfer import to_device


def test_averages_weigh_by_samples():
    averages = Averages()
    averages.add({"loss": torch.tensor([1.0], requires_grad=True), "hits": 2.0}, 3)
    averages.add({"loss": torch.tensor(5.0), "late": 1}, 1)
    assert averages.means() == {"loss": 2.0, "hits": 2.0, "late": 1.0} and averages.samples == 4


def test_averages_continue_bit_for_bit():
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    whole, first, second = Averages(), Averages(), Averages()
    for i, value in enumerate(values):
        whole.add({"x": value, "y": value.item()}, i + 1)
        (first if i < 4 else second).add({"x": value, "y": value.item()}, i + 1)
        if i == 3:
            second.load(first.state(), torch.device("cpu"))
    assert second.means() == whole.means()
    assert first.means() != whole.means()


def test_finite_check_names_the_first():
    check = FiniteCheck()
    for step, loss in enumerate((1.0, float("-inf"), 2.0, float("nan")), 7):
        check.add(torch.tensor(loss), step)
        if step == 7:
            check.raise_if_any("")
    with pytest.raises(FloatingPointError, match="the loss is -inf at step 8; look"):
        check.raise_if_any("look")


def test_progress_prints_lines_where_nobody_looks_on(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.Progress(5, 2, "epoch 1/3") as shown:
        shown.update(lambda: "loss 1")
    with progress.Progress(5, 2, "epoch 1/3", visible=False) as hidden:
        hidden.update(lambda: "never")
    assert capsys.readouterr().err == "epoch 1/3  3/5  loss 1\n"


def test_progress_does_not_ask_for_text_it_does_not_show():
    with progress.Progress(5, 0, "") as shown:
        shown.update(lambda: pytest.fail("this would wait for the GPU each step"))


def test_progress_bar_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    with progress.Progress(5, 2, "epoch 1/3") as shown:
        shown.update(lambda: "loss 1")
    text = capsys.readouterr().err
    assert "epoch 1/3" in text and "3/5" in text and "loss 1" in text


def test_no_bar_without_tqdm(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert progress._bar(5, 0, "") is None


def test_signals_are_noted_and_handlers_return():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):  # Somebody who has asked already and does not want to wait.
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_signals_leave_other_threads_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with stop_on_signals() as stop:
            seen.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(0, before)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_workers_still_die_of_sigterm():
    with stop_on_signals() as stop:
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches the workers too: the parent decides.
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
        assert stop.signal == 0


def test_batches_keep_their_shape_on_the_way_to_a_device():
    Batch = namedtuple("Batch", "images labels")

    @dataclasses.dataclass
    class Nested:
        batch: Batch
        others: list
        names: dict

    nested = Nested(Batch(torch.ones(2), torch.zeros(1)), [torch.ones(1), 3], {"a": (torch.ones(1), "b")})
    moved = to_device(nested, "meta")
    assert moved.batch.images.device.type == "meta" and isinstance(moved.batch, Batch)
    assert moved.others[0].is_meta and moved.others[1] == 3
    assert moved.names["a"][0].is_meta and moved.names["a"][1] == "b"
    assert to_device("text", "meta") == "text"
