"""The training loop: plain PyTorch, stoppable at any step, and resumed bit for bit."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import distributed
from .averages import Averages, FiniteCheck
from .background import Background
from .checkpoint import (Checkpoint, list_checkpoints, load_checkpoint, restore, set_aside_after, snapshot,
                         write_checkpoint)
from .log import RunLog
from .plain import plain_config
from .plan import peak_memory
from .progress import Progress
from .seeds import capture_rng, seed_everything
from .signals import StopRequest, stop_on_signals
from .transfer import cut, to_device

CHECKPOINTS = "checkpoints"
AMP_TYPES = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class History:
    """What a run has come to: the rows of metrics.csv, one a finished epoch, and where it stands.

    best: the best value of `best_metric` so far. unfinished: means over an epoch that `max_steps` has cut short.
    """

    rows: list[dict[str, Any]]
    epoch: int
    step: int
    best: float | None
    unfinished: dict[str, float]


class Trainer:
    """Trains a model; everything a recipe may want to look at or change in `on_epoch_end` is a plain attribute.

    loss_fn(model, batch) -> (loss, metrics): the batch is on the device; loss has one element; metrics, a dict of
    numbers or tensors, are averaged over the samples of the epoch. train_batches: `len()` batches an epoch;
    `epoch(number, first_batch)` yields them, with `labels` [B], in an order that depends on the number alone.
    evaluate(model) -> dict of numbers, after each epoch. best_metric: the one whose best checkpoint is kept; a leading
    "-" means that less is better. on_epoch_end(trainer, row) runs last and may add to the row of metrics.
    scheduler: stepped once an epoch, after the evaluation. amp: None, "bf16", or "fp16" (CUDA, with loss scaling).
    clip_norm: the largest norm of all gradients together. max_steps: stop after so many steps in total; the epoch that
    this cuts is neither evaluated nor logged as a row, and a later run with more steps continues it.
    accumulate: cut each batch into so many parts, whose gradients are summed before the one step: memory for a part,
    the gradient of the whole (layers with batch statistics see parts).
    checkpoint_minutes, checkpoint_steps: save so often, in `out/checkpoints`, besides the end and each new best epoch;
    the files are written beside the training.
    log_steps: how often to log inside an epoch, and to look for a loss that is not finite where each look waits for a
    GPU; on the CPU every step is checked.

    In a process group (see `distributed.process_group`) the model trains in DistributedDataParallel: `train_batches`
    yields this rank's slices, equally large; gradients are means over the ranks, metrics means over all samples;
    `evaluate` runs on every rank, its results are rank 0's; rank 0 writes. `out` is a folder that all ranks see.

    Before each step, `set_step(step)` is called on every module of the model that has it, so that random layers draw by
    step and not by history. A run killed at any step and resumed gives the bits of an undisturbed one: on the CPU with
    the same number of threads and processes, on CUDA in deterministic mode.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *,
                 loss_fn: Callable[[nn.Module, Any], tuple[Tensor, dict]], train_batches: Any, epochs: int,
                 out: str | os.PathLike, scheduler: Any = None,
                 evaluate: Callable[[nn.Module], dict[str, float]] | None = None, best_metric: str = "accuracy",
                 on_epoch_end: Callable[[Trainer, dict], None] | None = None, amp: str | None = None,
                 clip_norm: float | None = None, accumulate: int = 1, max_steps: int | None = None,
                 checkpoint_minutes: float | None = 10.0, checkpoint_steps: int | None = None, keep: int = 2,
                 log_steps: int = 100, tensorboard: bool = False, config: Any = None, seed: int = 0,
                 device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        if amp not in AMP_TYPES:
            raise ValueError(f"amp must be None, 'bf16' or 'fp16', got {amp!r}")
        if amp == "fp16" and self.device.type != "cuda":
            raise ValueError(f"amp='fp16' needs a CUDA device, got {self.device}; use 'bf16'")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise TypeError("scheduler: ReduceLROnPlateau is stepped with a metric, this loop steps without; "
                            "use a schedule over epochs")
        if len(train_batches) < 1:
            raise ValueError("train_batches holds no batch; choose a smaller batch size or keep the last batch")
        for name, value in (("epochs", epochs), ("max_steps", max_steps), ("checkpoint_steps", checkpoint_steps),
                            ("log_steps", log_steps), ("keep", keep), ("accumulate", accumulate)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.loss_fn, self.train_batches = loss_fn, train_batches
        self.evaluate, self.on_epoch_end = evaluate, on_epoch_end
        self.epochs, self.max_steps, self.clip_norm, self.best_metric = epochs, max_steps, clip_norm, best_metric
        self.out, self.config, self.keep, self.seed = Path(out), plain_config(config), keep, seed
        self.rank, self.world, self.accumulate = distributed.rank(), distributed.world(), accumulate
        self.checkpoint_minutes, self.checkpoint_steps = checkpoint_minutes, checkpoint_steps
        self.log_steps, self.tensorboard = log_steps, tensorboard
        self.amp_type = AMP_TYPES[amp]
        self.scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16")

        # The position in the run: finished epochs, finished batches of the next one, finished steps in all.
        self.epoch, self.batch, self.step = 0, 0, 0
        self.best: float | None = None
        self.seconds = 0.0  # Spent in the current epoch, over all processes that worked on it.
        self.averages = Averages()

    def fit(self, resume: str | os.PathLike = "auto") -> History:
        """Train to the end. SIGTERM or SIGINT: finish the step, save, raise SystemExit(128 + signal), 143 for SIGTERM.

        resume: "auto" continues from the newest sound checkpoint in `out`, or starts; "never" starts, and refuses a
        folder that holds checkpoints; else the path of a checkpoint or of a run. A start seeds everything with `seed`.
        FloatingPointError for a loss that is not finite; the checkpoints before it stay.
        """
        self._writer = Background("pyaccel-checkpoint")
        try:
            with stop_on_signals() as stop, RunLog(self.out, rank=self.rank, tensorboard=self.tensorboard) as self.log:
                self._begin(resume)
                while self.epoch < self.epochs and not self._is_cut():
                    self._train_epoch(stop)
                    if self._is_cut():
                        break
                    improved = self._end_epoch()
                    due, signal = distributed.largest(self._is_due(), stop.signal)
                    if improved or self.epoch == self.epochs or due:
                        self._save(best=improved)
                    self._leave_if(signal)
                self._save()
                self._writer.wait()
                distributed.share_buffers(self.model)
                rows = distributed.from_first(self.log.rows)
                return History(list(rows), self.epoch, self.step, self.best, self.averages.means())
        finally:
            self._writer.close()  # Whatever ended the run, a checkpoint on its way reaches the disk.

    def replace(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go on with another network and its optimizer, as surgery returns them; called from `on_epoch_end`.

        The next checkpoint holds them. To resume from it, a trainer needs a network of the same sizes: see
        `surgery.like_tensors`.
        """
        self.model, self.optimizer = model, optimizer
        if self.scheduler is not None:
            self.scheduler.optimizer = optimizer
        self._wrap()

    def _begin(self, resume: str | os.PathLike) -> None:
        folder = self.out / CHECKPOINTS
        self._saved: tuple[int, int] | None = None
        self._finite = FiniteCheck()
        checkpoint = self._find(resume, folder)
        if checkpoint is None:
            seed_everything(self.seed + self.rank)
            self.log.truncate(0, 0)
        else:
            self._load(checkpoint)
            self.log.truncate(self.step, self.epoch)
            distributed.barrier()  # All have read what rank 0 may now rename.
            if self.rank == 0:
                set_aside_after(folder, self.step)
            if checkpoint.folder.parent.resolve() == folder.resolve():
                self._saved = (self.epoch, self.step)
        self._wrap()
        self.log.event("resume" if checkpoint else "start", step=self.step, epoch=self.epoch, config=self.config,
                       world=self.world)
        self._last_save = time.monotonic()

    def _wrap(self) -> None:
        """Put the model into DistributedDataParallel, which gives all ranks the parameters and buffers of rank 0."""
        self._replica: nn.Module = self.model
        if self.world > 1:
            # Without the search for unused parameters the first step would sum gradients over more than two ranks in
            # another order than the later ones, and a resumed run would have a first step of its own.
            repeatable = self.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
            same_order = self.world > 2 and repeatable
            self._replica = DistributedDataParallel(self.model, find_unused_parameters=same_order)

    def _find(self, resume: str | os.PathLike, folder: Path) -> Checkpoint | None:
        if resume in ("auto", "never"):
            found = list_checkpoints(folder)
            if found and resume == "never":
                raise ValueError(f"{folder} holds checkpoints of an earlier run, the last is {found[0].name}; choose "
                                 "another folder, remove them, or resume")
            source = folder if found else None
        else:
            run = Path(resume) / CHECKPOINTS
            source = run if run.is_dir() else Path(resume)
        # Rank 0 decides which one is the newest sound one.
        checkpoint = load_checkpoint(source) if source and self.rank == 0 else None
        chosen = distributed.from_first(checkpoint and checkpoint.folder)
        return checkpoint or (load_checkpoint(chosen) if chosen else None)

    def _load(self, checkpoint: Checkpoint) -> None:
        changed = sorted(key for key in self.config.keys() | checkpoint.config.keys()
                         if self.config.get(key) != checkpoint.config.get(key))
        if changed:
            warnings.warn(f"the configuration differs from the checkpoint's in {', '.join(changed)}; what the "
                          "optimizer and the scheduler hold, such as learning rates, is taken from the checkpoint",
                          stacklevel=4)
        before = len(checkpoint.state["rng"])
        position = restore(checkpoint, self.model, self.optimizer, self.scheduler, self._used_scaler(),
                           restore_random=before == self.world, rank=min(self.rank, before - 1))
        self.epoch, self.batch, self.step = position["epoch"], position["batch"], position["step"]
        self.best, self.seconds = position["best"], position["seconds"]
        if before != self.world:
            seed_everything(self.seed + self.step * self.world + self.rank)
            warnings.warn(f"the run was saved by {before} processes and goes on with {self.world}: batches hold the same "
                          "images in the same order; sums of gradients are rounded otherwise, and torch's random "
                          "generators (dropout) are seeded anew, so its numbers will differ slightly", stacklevel=4)
        if self.rank == 0:  # It holds the sums of all ranks.
            self.averages.load(position["averages"], self.device)

    def _train_epoch(self, stop: StopRequest) -> None:
        self.model.train()
        modules = [module for module in self.model.modules() if callable(getattr(module, "set_step", None))]
        label = f"epoch {self.epoch + 1}/{self.epochs}"
        self._clock = time.monotonic()
        with (Progress(len(self.train_batches), self.batch, label, visible=self.rank == 0) as progress,
              _closing(self.train_batches.epoch(self.epoch, self.batch)) as batches):
            for batch in batches:
                for module in modules:
                    module.set_step(self.step)
                self._train_step(to_device(batch, self.device))
                self.batch, self.step = self.batch + 1, self.step + 1
                self._count_time()
                progress.update(self._status)
                if self.step % self.log_steps == 0:
                    self._check_finite()
                    self.log.event("step", **self._row())
                self._writer.check()
                if self._ranks_agree():
                    due, signal = distributed.largest(self._is_due(), stop.signal)
                    if due:
                        self._save()
                    self._leave_if(signal)
                if self._is_cut():
                    return
        if self.batch != len(self.train_batches):
            raise ValueError(f"train_batches: len() promised {len(self.train_batches)} batches an epoch, "
                             f"epoch {self.epoch} ended after {self.batch}")

    def _train_step(self, batch: Any) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        parts = [batch] if self.accumulate == 1 else cut(batch, self.accumulate)
        for part in parts[:-1]:
            with self._replica.no_sync() if self.world > 1 else nullcontext():
                self._add_gradient(part, len(part.labels) / len(batch.labels))
        self._add_gradient(parts[-1], len(parts[-1].labels) / len(batch.labels))
        if self.device.type == "cpu":
            self._check_finite()
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _add_gradient(self, batch: Any, share: float) -> None:
        """Add the gradient of a part that has this share of the batch's samples."""
        with torch.autocast(self.device.type, self.amp_type) if self.amp_type else nullcontext():
            loss, metrics = self.loss_fn(self._replica, batch)
        if loss.numel() != 1:
            raise ValueError(f"loss_fn must return a loss of one element, got shape {list(loss.shape)}")
        self._finite.add(loss, self.step + 1)
        self.averages.add({"loss": loss, **metrics}, len(batch.labels))
        self.scaler.scale(loss if share == 1.0 else loss * share).backward()

    def _end_epoch(self) -> bool:
        """Evaluate, log, and move to the next epoch; whether this one was the best so far."""
        self._check_finite()
        row = self._row()
        distributed.share_buffers(self.model)
        results = distributed.from_first(self.evaluate(self.model) if self.evaluate else {})
        row.update((f"eval_{name}", value) for name, value in results.items())
        if self.scheduler is not None:
            with warnings.catch_warnings():  # Resumed at the end of the first epoch, this process has made no step.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
                self.scheduler.step()
        self.epoch, self.batch, self.seconds, self.averages = self.epoch + 1, 0, 0.0, Averages()
        row["epoch"] = self.epoch
        if self.on_epoch_end is not None:
            self.on_epoch_end(self, row)
        self.log.metrics(row)
        return self._is_best(results)

    def _is_best(self, results: dict[str, float]) -> bool:
        name = self.best_metric.removeprefix("-")
        if name not in results:
            if results:
                warnings.warn(f"evaluate returned {', '.join(results)} but no {name}: no best checkpoint is kept; "
                              "name one of them as best_metric", stacklevel=4)
            return False
        value = float(results[name])
        sign = -1.0 if self.best_metric.startswith("-") else 1.0
        if math.isnan(value) or self.best is not None and sign * value <= sign * self.best:
            return False
        self.best = value
        return True

    def _save(self, best: bool = False) -> None:
        """Write a checkpoint of this position, unless it is written already. All ranks come here together."""
        if self._saved == (self.epoch, self.step):
            return
        self._check_finite()
        rng, averages = distributed.from_all(capture_rng()), self.averages.over_ranks()
        if self.rank == 0:
            self._writer.wait()
            self.log.sync()
            position = {"epoch": self.epoch, "batch": self.batch, "step": self.step, "best": self.best,
                        "seconds": self.seconds, "averages": averages.state()}
            taken = snapshot(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler,
                             scaler=self._used_scaler(), position=position, config=self.config, rng=rng)
            self._writer.submit(lambda: write_checkpoint(self.out / CHECKPOINTS, taken, keep=self.keep, best=best))
        self._saved = (self.epoch, self.step)
        self._last_save = self._clock = time.monotonic()

    def _ranks_agree(self) -> bool:
        """Whether the ranks ask each other after this step what to do: a message around all of them, so that many ask
        seldom, every 64 steps of 512 processes. A question of steps is the same for all."""
        by_steps = self.checkpoint_steps is not None and self.step % self.checkpoint_steps == 0
        return by_steps or self.step % max(1, self.world // 8) == 0

    def _is_due(self) -> bool:
        """Whether to save now. Ranks have clocks of their own: they agree by `distributed.largest`."""
        if self._saved is not None and self._saved[1] == self.step:
            return False
        minutes = (time.monotonic() - self._last_save) / 60
        return (self.checkpoint_minutes is not None and minutes >= self.checkpoint_minutes
                or self.checkpoint_steps is not None and self.step % self.checkpoint_steps == 0)

    def _is_cut(self) -> bool:
        """Whether max_steps ends the run here; an epoch whose batches are all done still gets its evaluation."""
        return self.max_steps is not None and self.step >= self.max_steps and self.batch < len(self.train_batches)

    def _leave_if(self, signal: int) -> None:
        if signal:
            self._save()
            self._writer.wait()
            distributed.barrier()  # No rank's end makes torchrun end rank 0 before the checkpoint is written.
            self.log.event("stop", step=self.step, epoch=self.epoch, signal=signal)
            raise SystemExit(128 + signal)

    def _check_finite(self) -> None:
        self._finite.raise_if_any(f"the checkpoints in {self.out / CHECKPOINTS} are from before it. Lower the learning "
                                  "rate, set clip_norm, or look at the batch of this step")

    def _used_scaler(self) -> torch.amp.GradScaler | None:
        return self.scaler if self.scaler.is_enabled() else None

    def _count_time(self) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def _row(self) -> dict[str, Any]:
        averages = self.averages.over_ranks()
        means = averages.means()
        self._count_time()  # After the means, which have waited for the device.
        return {"epoch": self.epoch, "step": self.step, "lr": float(self.optimizer.param_groups[0]["lr"]),
                **{f"train_{name}": value for name, value in means.items()},
                "seconds": self.seconds, "samples_per_second": averages.samples / max(self.seconds, 1e-9),
                "memory_mb": peak_memory(self.device) / 2**20}

    def _status(self) -> str:
        loss = self.averages.means()["loss"]
        samples = self.world * self.averages.samples  # of this rank, as equal slices go to all
        return f"loss {loss:.4g}  {samples / max(self.seconds, 1e-9):.4g} samples/s"


def _closing(batches: Any):
    """The iterator, closed at the end if it can be: its workers then end with the epoch also when an error ends it."""
    iterator: Iterator = iter(batches)
    return closing(iterator) if hasattr(iterator, "close") else nullcontext(iterator)
