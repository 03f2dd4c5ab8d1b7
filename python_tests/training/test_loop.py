from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import threading

import pytest
import torch
from torch import nn

from pyaccel.training import Trainer, checkpoint, list_checkpoints, load_checkpoint, loop
from pyaccel.training.log import TIME_COLUMNS

STEPS = 15  # 3 epochs of 5 batches.


class PowerCut(BaseException):
    """Ends a run on the spot, as a kill would: nothing in the product catches it."""


def cut_at(tiny, count, action=None):
    """A loss function that ends the run (or does `action`) when it is called for the count-th time."""
    calls = iter(range(1, 1000))

    def loss_fn(model, batch):
        if next(calls) == count:
            if action is None:
                raise PowerCut
            action()
        return tiny.loss_fn(model, batch)

    return loss_fn


def rows(out):
    with open(out / "metrics.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in TIME_COLUMNS} for row in csv.DictReader(file)]


def step_events(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in (*TIME_COLUMNS, "time")} for record in records
            if record["event"] in ("step", "metrics")]


def final(out):
    """All that a run leaves, times excepted: SHA-256 of the weights, the other state, the log."""
    folder = list_checkpoints(out / "checkpoints")[0]
    state = load_checkpoint(folder).state
    state["position"].pop("seconds")
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), state, rows(out), step_events(out)


def assert_same(first, second, where="state"):
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    else:
        assert first == second, where


def assert_equal_runs(first, second):
    assert first[0] == second[0]
    assert_same(first[1], second[1])
    assert first[2:] == second[2:]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    results = {}

    def run(kind):
        if kind not in results:
            out = tmp_path_factory.mktemp(kind)
            tiny.trainer(out, kind).fit()
            results[kind] = final(out)
        return results[kind]

    return run


@pytest.mark.parametrize(("kind", "count"), [*(("adam", count) for count in range(1, STEPS + 1)),
                                             *(("sgd", count) for count in (4, 8, 12, 15))])
def test_a_run_cut_at_any_step_and_resumed_is_the_undisturbed_run(tiny, undisturbed, tmp_path, kind, count):
    with pytest.raises(PowerCut):
        tiny.trainer(tmp_path, kind, loss_fn=cut_at(tiny, count)).fit()
    saved = (count - 1) // 3 * 3
    if saved == 0:
        assert list_checkpoints(tmp_path / "checkpoints") == []
    torch.rand(7)  # Another process has other random states.
    history = tiny.trainer(tmp_path, kind).fit()
    assert_equal_runs(final(tmp_path), undisturbed(kind))
    assert history.step == STEPS and history.epoch == 3 and [row["epoch"] for row in history.rows] == [1, 2, 3]


def test_cut_many_times(tiny, undisturbed, tmp_path):
    runs = 0
    while runs < 20:
        try:
            tiny.trainer(tmp_path, checkpoint_steps=2, loss_fn=cut_at(tiny, 4)).fit()
            break
        except PowerCut:
            runs += 1
    assert runs == 5  # From steps 0, 2, 5 (a best epoch), 8, 10; the sixth, from 12, comes to the end.
    assert_equal_runs(final(tmp_path), undisturbed("adam"))


@pytest.mark.parametrize("count", [5, 10, 15])
def test_cut_in_the_evaluation(tiny, undisturbed, tmp_path, count):
    """A checkpoint of the last batch of an epoch comes before its evaluation, which is then done again."""
    def evaluate(model):
        if runner.step == count:
            raise PowerCut
        return tiny.evaluate(model)

    runner = tiny.trainer(tmp_path, evaluate=evaluate, checkpoint_steps=5)
    with pytest.raises(PowerCut):
        runner.fit()
    assert load_checkpoint(tmp_path / "checkpoints").position["batch"] == 5
    tiny.trainer(tmp_path, checkpoint_steps=5).fit()
    assert_equal_runs(final(tmp_path), undisturbed("adam"))


@pytest.mark.parametrize("what", ["restore_rng", "averages", "optimizer", "first_batch"])
def test_control_every_part_of_the_state_is_needed(tiny, undisturbed, tmp_path, monkeypatch, what):
    with pytest.raises(PowerCut):
        tiny.trainer(tmp_path, loss_fn=cut_at(tiny, 8)).fit()
    runner = tiny.trainer(tmp_path)
    if what == "restore_rng":
        monkeypatch.setattr(checkpoint, "restore_rng", lambda state, generator: torch.manual_seed(0))
    elif what == "averages":
        monkeypatch.setattr(runner.averages, "load", lambda state, device: None)
    elif what == "optimizer":
        monkeypatch.setattr(runner.optimizer, "load_state_dict", lambda state: None)
    else:
        epoch = runner.train_batches.epoch
        monkeypatch.setattr(runner.train_batches, "epoch", lambda number, first=0: list(epoch(number))[:5 - first])
    runner.fit()
    weights, _, log, _ = final(tmp_path)
    assert (weights == undisturbed("adam")[0]) == (what == "averages")
    assert log != undisturbed("adam")[2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("count", [3, 5, 7])
def test_a_signal_saves_and_exits(tiny, undisturbed, tmp_path, number, code, count):
    """Step 5 is the last of its epoch: saved before the evaluation."""
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        tiny.trainer(tmp_path, checkpoint_steps=None,
                     loss_fn=cut_at(tiny, count, lambda: os.kill(os.getpid(), number))).fit()
    assert exit_.value.code == code and signal.getsignal(number) == before
    saved = load_checkpoint(tmp_path / "checkpoints")
    position = saved.position["epoch"], saved.position["batch"]
    assert saved.step == count and position == ((count - 1) // 5, (count - 1) % 5 + 1)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["event"] == "stop"
    tiny.trainer(tmp_path, checkpoint_steps=None).fit()
    assert_equal_runs(final(tmp_path), undisturbed("adam"))


def test_a_signal_in_the_evaluation_is_obeyed_after_it(tiny, undisturbed, tmp_path):
    def evaluate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        return tiny.evaluate(model)

    with pytest.raises(SystemExit):
        tiny.trainer(tmp_path, checkpoint_steps=None, evaluate=evaluate).fit()
    position = load_checkpoint(tmp_path / "checkpoints").position
    assert (position["epoch"], position["batch"], position["step"]) == (1, 0, 5)
    tiny.trainer(tmp_path).fit()
    assert_equal_runs(final(tmp_path), undisturbed("adam"))


def test_training_in_another_thread(tiny, undisturbed, tmp_path):
    errors = []

    def work():
        try:
            torch.set_num_threads(1)
            tiny.trainer(tmp_path).fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert_equal_runs(final(tmp_path), undisturbed("adam"))


def test_max_steps_cuts_an_epoch_and_a_longer_run_continues_it(tiny, undisturbed, tmp_path):
    history = tiny.trainer(tmp_path, max_steps=7).fit()
    assert (history.step, history.epoch, len(history.rows)) == (7, 1, 1)
    assert history.unfinished["one"] == 1.0 and history.unfinished["loss"] > 0
    again = tiny.trainer(tmp_path, max_steps=7).fit()
    assert again == history
    history = tiny.trainer(tmp_path, max_steps=10).fit()  # The end of an epoch: this one is evaluated.
    assert (history.step, history.epoch, len(history.rows)) == (10, 2, 2)
    history = tiny.trainer(tmp_path).fit()
    assert history.unfinished == {}
    assert_equal_runs(final(tmp_path), undisturbed("adam"))


def test_a_finished_run_stays_as_it_is(tiny, tmp_path):
    first = tiny.trainer(tmp_path).fit()
    content = final(tmp_path)

    def fail(*_):
        pytest.fail("a finished run trains or evaluates again")

    second = tiny.trainer(tmp_path, loss_fn=fail, evaluate=fail).fit()
    assert first == second
    assert_equal_runs(final(tmp_path), content)


def test_resume_from_a_path(tiny, undisturbed, tmp_path):
    tiny.trainer(tmp_path / "a", keep=9).fit()
    tiny.trainer(tmp_path / "b").fit(tmp_path / "a" / "checkpoints" / "step-00000006")  # Into another run folder.
    assert final(tmp_path / "b")[0] == undisturbed("adam")[0]
    assert [row["epoch"] for row in rows(tmp_path / "b")] == ["2", "3"]
    tiny.trainer(tmp_path / "a", keep=9).fit(tmp_path / "a" / "checkpoints" / "step-00000003")  # Back in the same one.
    assert_equal_runs(final(tmp_path / "a"), undisturbed("adam"))
    assert (tmp_path / "a" / "checkpoints" / "step-00000012.aside").is_dir()
    tiny.trainer(tmp_path / "c").fit(tmp_path / "a")  # A run folder: its newest.
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["checkpoints", "log.jsonl"]
    with pytest.raises(FileNotFoundError):
        tiny.trainer(tmp_path / "d").fit(tmp_path / "nowhere")


def test_never_refuses_a_folder_with_checkpoints(tiny, tmp_path):
    tiny.trainer(tmp_path, max_steps=2).fit("never")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run, the last is step-00000002"):
        tiny.trainer(tmp_path).fit("never")


def test_damaged_newest_checkpoint(tiny, undisturbed, tmp_path):
    tiny.trainer(tmp_path, max_steps=9, keep=9).fit()
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-00000009" / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="falling back to the checkpoint of step 6"):
        tiny.trainer(tmp_path).fit()
    assert_equal_runs(final(tmp_path), undisturbed("adam"))
    assert (checkpoints / "step-00000009.aside").is_dir()
    for folder in list_checkpoints(checkpoints):
        (folder / "meta.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no sound checkpoint"):
        tiny.trainer(tmp_path).fit()


def test_changed_configuration_is_told(tiny, tmp_path):
    tiny.trainer(tmp_path, max_steps=2, config={"lr": 1, "width": 2}).fit()
    with pytest.warns(UserWarning, match="the configuration differs from the checkpoint's in lr, new; what"):
        tiny.trainer(tmp_path, max_steps=2, config={"lr": 2, "width": 2, "new": 1}).fit()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(tiny, tmp_path, value):
    def loss_fn(model, batch):
        loss, metrics = tiny.loss_fn(model, batch)
        return (loss * value if runner.step == 7 else loss), metrics

    runner = tiny.trainer(tmp_path, loss_fn=loss_fn)
    with pytest.raises(FloatingPointError, match=f"the loss is {value} at step 8; the checkpoints in .* from before"):
        runner.fit()
    assert load_checkpoint(tmp_path / "checkpoints").step == 6
    assert all(torch.isfinite(parameter).all() for parameter in runner.model.parameters())


def test_loss_that_is_not_finite_where_looking_is_rare(tiny, tmp_path, monkeypatch):
    """On a GPU no step waits for a look at the loss, but no checkpoint is written without one."""
    looks = []

    def loss_fn(model, batch):
        loss, metrics = tiny.loss_fn(model, batch)
        return (loss * float("nan") if runner.step == 6 else loss), metrics

    class Unseen:  # What the loop asks the device is whether it is the CPU.
        type = "gpu"

    runner = tiny.trainer(tmp_path, loss_fn=loss_fn, log_steps=4)
    check, train_step = runner._check_finite, runner._train_step
    monkeypatch.setattr(runner, "_check_finite", lambda: (looks.append(runner.step), check()))

    def step_on_gpu(batch):
        monkeypatch.setattr(runner, "device", Unseen())
        train_step(batch)
        monkeypatch.setattr(runner, "device", torch.device("cpu"))

    monkeypatch.setattr(runner, "_train_step", step_on_gpu)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 7"):
        runner.fit()
    assert looks == [3, 4, 5, 5, 6, 8]  # Checkpoints at 3, 5 (the best), 6; the log at 4, 8; the epoch's end at 5.
    assert load_checkpoint(tmp_path / "checkpoints").step == 6


def test_best_checkpoint_is_kept(tiny, tmp_path):
    scores = iter([0.2, 0.9, 0.5, float("nan"), 0.9])
    history = tiny.trainer(tmp_path, epochs=5, keep=1, evaluate=lambda model: {"score": next(scores)},
                           best_metric="score").fit()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000025", "step-00000010"]
    assert history.best == 0.9
    scores = iter([0.2, 0.1, 0.5])
    history = tiny.trainer(tmp_path / "less", keep=1, evaluate=lambda model: {"score": next(scores)},
                           best_metric="-score").fit()
    assert history.best == 0.1
    with pytest.warns(UserWarning, match="evaluate returned top5 but no accuracy"):
        assert tiny.trainer(tmp_path / "other", epochs=1, evaluate=lambda model: {"top5": 1.0}).fit().best is None


def test_log_and_hook(tiny, tmp_path):
    seen = []

    def on_epoch_end(trainer, row):
        seen.append((trainer.epoch, trainer.step, trainer.optimizer.param_groups[0]["lr"]))
        row["sparsity"] = 0.5 * trainer.epoch

    history = tiny.trainer(tmp_path, on_epoch_end=on_epoch_end).fit()
    assert [(epoch, step) for epoch, step, _ in seen] == [(1, 5), (2, 10), (3, 15)]
    assert [row["lr"] for row in history.rows] == pytest.approx([1e-2, 3e-3, 3e-3])  # One scheduler step an epoch.
    row = history.rows[1]
    assert row["sparsity"] == 1.0 and row["train_one"] == 1.0 and 0 <= row["eval_accuracy"] <= 1
    assert row["samples_per_second"] == pytest.approx(20 / row["seconds"]) and row["memory_mb"] > 1
    assert list(row)[:3] == ["epoch", "step", "lr"]
    assert [event["step"] for event in step_events(tmp_path)] == [2, 4, 5, 6, 8, 10, 10, 12, 14, 15]


def test_metrics_are_means_over_samples(tiny, tmp_path):
    losses = []

    def loss_fn(model, batch):
        loss, _ = tiny.loss_fn(model, batch)
        losses.append((loss.item(), len(batch.labels)))
        return loss, {}

    history = tiny.trainer(tmp_path, train_batches=tiny.TinyBatches(22, 5), epochs=1, loss_fn=loss_fn).fit()
    assert [count for _, count in losses] == [5, 5, 5, 5, 2]
    assert history.rows[0]["train_loss"] == pytest.approx(sum(loss * count for loss, count in losses) / 22, rel=1e-12)


def test_set_step_counts_over_epochs_and_reaches_every_module(tiny, tmp_path):
    seen = []

    class Watch(nn.Module):
        def set_step(self, step):
            seen.append(step)

        def forward(self, x):
            return x

    runner = tiny.trainer(tmp_path, max_steps=7)
    runner.model[3] = nn.Sequential(Watch(), Watch())
    runner.fit()
    assert seen == [step for step in range(7) for _ in range(2)]


def test_clipping(tiny, tmp_path):
    def change(clip_norm, out, scaler=None):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        runner = Trainer(model, torch.optim.SGD(model.parameters(), 1.0), loss_fn=tiny.loss_fn, epochs=1, max_steps=1,
                         train_batches=tiny.TinyBatches(), clip_norm=clip_norm, out=tmp_path / out)
        runner.scaler = scaler or runner.scaler
        runner.fit()
        return torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)]).norm().item()

    assert change(0.01, "clipped") == pytest.approx(0.01, rel=1e-3)
    assert change(0.01, "scaled", torch.amp.GradScaler("cpu", init_scale=64.0)) == pytest.approx(0.01, rel=1e-3)
    assert change(None, "free") > 0.1


def test_an_evaluation_that_leaves_the_model_in_evaluation_mode(tiny, tmp_path):
    modes = []

    def loss_fn(model, batch):
        modes.append(model.training)
        return tiny.loss_fn(model, batch)

    tiny.trainer(tmp_path, loss_fn=loss_fn, evaluate=lambda model: {"accuracy": float(not model.eval().training)}).fit()
    assert modes == [True] * STEPS


def test_bf16_autocast(tiny, tmp_path):
    types = []

    def loss_fn(model, batch):
        logits = model(batch.images)
        types.append(logits.dtype)
        return nn.functional.cross_entropy(logits.float(), batch.labels), {}

    runner = tiny.trainer(tmp_path, amp="bf16", epochs=1, loss_fn=loss_fn)
    runner.fit()
    assert set(types) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_loss_scaling_is_part_of_the_state(tiny, tmp_path, monkeypatch):
    """The path of fp16, with torch's scaler for the CPU, whose scale grows each second step."""
    def run(out, **options):
        runner = tiny.trainer(tmp_path / out, **options)
        runner.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        runner.fit()
        return runner.scaler.get_scale()

    assert run("whole") == 4.0 * 2**7
    assert run("cut", max_steps=7) == 4.0 * 2**3
    assert run("cut") == 4.0 * 2**7
    assert final(tmp_path / "whole")[1]["scaler"]["scale"] == 4.0 * 2**7
    assert_equal_runs(final(tmp_path / "cut"), final(tmp_path / "whole"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [None, "fp16", "bf16"])
def test_cuda_cut_and_resumed(tiny, tmp_path, monkeypatch, amp):
    from pyaccel.training import deterministic

    def run(out, **options):
        model, optimizer, scheduler = tiny.build()
        model.to("cuda")
        Trainer(model, optimizer, loss_fn=tiny.loss_fn, train_batches=tiny.TinyBatches(), epochs=3, scheduler=scheduler,
                out=out, amp=amp, device="cuda", checkpoint_steps=3, **options).fit()

    monkeypatch.setattr(tiny.StepNoise, "forward", lambda self, x: x)  # Its CPU generator cannot draw on the GPU.
    with deterministic():
        run(tmp_path / "whole")
        run(tmp_path / "cut", max_steps=7)
        run(tmp_path / "cut")
    assert_equal_runs(final(tmp_path / "cut"), final(tmp_path / "whole"))


def test_minutes_between_checkpoints(tiny, tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 20))  # Each look at the clock takes 20 s.
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    saves = []
    monkeypatch.setattr(loop, "write_checkpoint", lambda folder, taken, **options: saves.append(taken.step))
    tiny.trainer(tmp_path, evaluate=None, checkpoint_steps=None, checkpoint_minutes=3.0).fit()
    assert saves[-1] == STEPS and len(saves) > 2 and saves == sorted(set(saves))
    saves.clear()
    tiny.trainer(tmp_path, evaluate=None, checkpoint_steps=None, checkpoint_minutes=None).fit()
    assert saves == [STEPS]


@pytest.mark.parametrize(("options", "error", "text"), [
    ({"amp": "fp8"}, ValueError, "amp must be None, 'bf16' or 'fp16', got 'fp8'"),
    ({"amp": "fp16"}, ValueError, "amp='fp16' needs a CUDA device, got cpu; use 'bf16'"),
    ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
    ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
    ({"train_batches": []}, ValueError, "train_batches holds no batch"),
    ({"config": {"x": object()}}, TypeError, "config: expected numbers"),
])
def test_wrong_arguments(tiny, tmp_path, options, error, text):
    with pytest.raises(error, match=text):
        tiny.trainer(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_scheduler_that_wants_a_metric(tiny, tmp_path):
    _, optimizer, _ = tiny.build()
    with pytest.raises(TypeError, match="ReduceLROnPlateau is stepped with a metric"):
        tiny.trainer(tmp_path, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def test_wrong_losses_and_batches(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"loss_fn must return a loss of one element, got shape \[4\]"):
        tiny.trainer(tmp_path / "a", loss_fn=lambda model, batch: (model(batch.images)[:, 0], {})).fit()

    class Short(tiny.TinyBatches):
        def __len__(self):
            return 6

    with pytest.raises(ValueError, match=r"len\(\) promised 6 batches an epoch, epoch 0 ended after 5"):
        tiny.trainer(tmp_path / "b", train_batches=Short()).fit()


def test_workers_of_the_batches_end_with_an_error(tiny, tmp_path):
    closed = []

    class Watched(tiny.TinyBatches):
        def epoch(self, epoch, first_batch=0):
            try:
                yield from super().epoch(epoch, first_batch)
            finally:
                closed.append(epoch)

    errors = []
    try:
        tiny.trainer(tmp_path, train_batches=Watched(), loss_fn=cut_at(tiny, 7)).fit()
    except PowerCut as error:
        errors.append(error)  # Its traceback keeps the generator alive.
    assert errors and closed == [0, 1]
