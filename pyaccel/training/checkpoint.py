"""Checkpoints: folders `step-00000123` that are complete or absent, checked when read, and free of pickled code.

A folder holds `model.safetensors` (parameters, buffers), `state.pt` (optimizer, scheduler, scaler, random generators,
position in the run; loads with `weights_only=True`) and, written last, `meta.json` (configuration, versions, and the
SHA-256 and size of the other two; a SHA-256 of itself).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .durable import sync_file, sync_folder
from .plain import plain_config, plain_state
from .seeds import capture_rng, restore_rng
from .weights import apply_tensors, named_tensors, read_tensors, write_tensors

FORMAT = 1
WEIGHTS, STATE, META = "model.safetensors", "state.pt", "meta.json"

# ".old": the former checkpoint of the same step, in the instant between two renames or when a kill came just there.
_NAME = re.compile(r"step-(\d{8,})(\.old)?")


class CheckpointError(ValueError):
    """A checkpoint is there but not sound; the text names the step, the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read and verified: all tensors on the CPU."""

    folder: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta["config"]

    @property
    def position(self) -> dict[str, Any]:
        return self.state["position"]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, copied to the CPU: training may go on while it is written."""

    tensors: dict[str, Tensor]
    ties: dict[str, str]
    state: dict[str, Any]
    config: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["position"]["step"])


def snapshot(*, model: nn.Module, optimizer=None, scheduler=None, scaler=None, position: dict,
             config: dict | None = None, rng: list[dict] | None = None) -> Snapshot:
    """Copy what `write_checkpoint` writes.

    position: plain values and tensors; position["step"] is the number of finished steps. config: what JSON can hold, or
    a dataclass of it. rng: the `capture_rng()` of every process, this one's by default.
    TypeError names a value that would not load again.
    """
    if "step" not in position:
        raise ValueError(f"position must hold the number of finished steps as 'step', got {sorted(position)}")
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    state = {name: None if part is None else plain_state(part.state_dict(), name) for name, part in parts.items()}
    state["classes"] = {name: type(part).__name__ for name, part in parts.items() if part is not None}
    state["rng"] = plain_state(rng if rng is not None else [capture_rng()], "rng")
    state["position"] = plain_state(position, "position")
    tensors, ties = named_tensors(model)
    return Snapshot(tensors, ties, state, plain_config(config))


def write_checkpoint(folder: str | os.PathLike, taken: Snapshot, *, keep: int = 2, best: bool = False) -> Path:
    """Write `folder/step-…` and remove all but the `keep` newest checkpoints and the newest one saved as `best`.

    An earlier checkpoint of the same step is replaced.
    OSError where it cannot be written (a full disk): nothing is left of it and earlier checkpoints are untouched.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    folder, step = Path(folder), taken.step
    meta = {"format": FORMAT, "step": step, "best": bool(best), "config": taken.config, "versions": _versions()}
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = folder / f"step-{step:08d}"
    temporary, old = final.with_name(final.name + ".tmp"), final.with_name(final.name + ".old")
    try:
        _write(temporary, taken, meta)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = _os_error(error)
        if cause is None:
            raise
        raise OSError(cause.errno, f"checkpoint of step {step} could not be written in {folder}: {cause}; "
                                   "earlier checkpoints are untouched") from error
    if final.exists():
        _remove(old)
        os.rename(final, old)
    os.rename(temporary, final)
    sync_folder(folder)
    _purge(folder, step, keep)
    return final


def save_checkpoint(folder: str | os.PathLike, *, keep: int = 2, best: bool = False, **parts: Any) -> Path:
    """`write_checkpoint` of a `snapshot` of these parts, here and now."""
    return write_checkpoint(folder, snapshot(**parts), keep=keep, best=best)


def load_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Read and verify the checkpoint in a step folder, or the newest sound one of the step folders in `folder`.

    CheckpointError names the step, the file and what is wrong with it. Given a folder of checkpoints, unsound ones are
    passed over with one warning that says so, and the error comes only if none is sound. FileNotFoundError if there is
    no checkpoint at all.
    """
    folder = Path(folder)
    if _NAME.fullmatch(folder.name) or (folder / META).exists():
        return _read(folder)
    problems = []
    for candidate in list_checkpoints(folder):
        try:
            checkpoint = _read(candidate)
        except (CheckpointError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"falling back to the checkpoint of step {checkpoint.step}: {'; '.join(problems)}",
                          stacklevel=2)
        return checkpoint
    if problems:
        raise CheckpointError(f"{folder} holds no sound checkpoint: {'; '.join(problems)}")
    raise FileNotFoundError(f"{folder}: no checkpoint (a folder step-00000123) in it")


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer=None, scheduler=None, scaler=None, *,
            restore_random: bool = True, generator: np.random.Generator | None = None, rank: int = 0) -> dict:
    """Put a checkpoint into the given objects and the random generators; returns its position.

    ValueError, naming them, for parameters that are missing, unexpected or of another shape, and for an optimizer,
    scheduler or scaler of another class or without state in the checkpoint. rank: whose random states to take.
    """
    where, state = f"checkpoint of step {checkpoint.step} in {checkpoint.folder}", checkpoint.state
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    parts = {name: part for name, part in parts.items() if part is not None}
    for name, part in parts.items():
        saved = state["classes"].get(name)
        if saved != type(part).__name__:
            raise ValueError(f"{where}: expected the state of {name} {type(part).__name__}, "
                             f"the checkpoint holds {saved or 'none'}")
    apply_tensors(model, checkpoint.tensors, where)
    for name, part in parts.items():
        part.load_state_dict(copy.deepcopy(state[name]))  # Optimizers keep what they are given and change it in place.
    if restore_random:
        restore_rng(state["rng"][rank], generator)
    return copy.deepcopy(state["position"])


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The step folders in `folder`, sound or not, newest first; empty where there is no such folder."""
    folder = Path(folder)
    found = [(path, match) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := _NAME.fullmatch(path.name))]
    return [path for path, match in sorted(found, key=lambda it: (int(it[1][1]), it[1][2] is None), reverse=True)]


def best_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest step folder that was saved with `best=True`; None where there is none. It is not verified here."""
    return next((path for path in list_checkpoints(folder) if _is_best(path)), None)


def set_aside_after(folder: str | os.PathLike, step: int) -> None:
    """Rename the checkpoints of later steps to `step-….aside`: a run resumed at `step` will write its own."""
    for path in list_checkpoints(folder):
        if _step(path) > step:
            aside = path.with_name(path.name + ".aside")
            _remove(aside)
            os.rename(path, aside)


def _write(folder: Path, taken: Snapshot, meta: dict) -> None:
    folder.mkdir()
    write_tensors(folder / WEIGHTS, taken.tensors, {"ties": taken.ties})
    with open(folder / STATE, "wb") as file:
        torch.save(taken.state, file)
    meta["files"] = {}
    for name in (WEIGHTS, STATE):
        sync_file(folder / name)
        meta["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    meta["sha256"] = _meta_digest(meta)
    with open(folder / META, "w", encoding="utf-8") as file:
        file.write(json.dumps(meta, indent=1) + "\n")
    sync_file(folder / META)
    sync_folder(folder)


def _read(folder: Path) -> Checkpoint:
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such checkpoint")
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder}: not a folder")
    name = META
    try:
        meta = _read_meta(folder)
        for name in (WEIGHTS, STATE):
            _verify(folder / name, meta["files"][name])
        name = WEIGHTS
        tensors, _ = read_tensors(folder / name)
        name = STATE
        state = torch.load(folder / name, map_location="cpu", weights_only=True)
        return Checkpoint(folder, meta, tensors, state)
    except CheckpointError as error:
        problem = str(error)
    except pickle.UnpicklingError:
        problem = "refused, it holds pickled objects or code, which a checkpoint never does"
    except (OSError, SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        problem = f"cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}"
    raise CheckpointError(f"checkpoint of step {_step(folder)} in {folder}: {name}: {problem}")


def _read_meta(folder: Path) -> dict:
    file = folder / META
    if not file.is_file():
        raise CheckpointError("missing")
    try:
        meta = json.loads(file.read_bytes())
        version, digest = meta["format"], meta["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("truncated or damaged, it is not the JSON that was written") from error
    if version != FORMAT:
        raise CheckpointError(f"unknown format version {version}, this pyaccel reads {FORMAT}")
    if digest != _meta_digest(meta):
        raise CheckpointError("hash differs, its content is not what was written")
    match = _NAME.fullmatch(folder.name)
    if match and int(match[1]) != meta["step"]:
        raise CheckpointError(f"says step {meta['step']}, the folder's name another")
    return meta


def _verify(file: Path, expected: dict) -> None:
    if not file.is_file():
        raise CheckpointError("missing")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{'truncated' if size < expected['bytes'] else 'too long'}, "
                              f"{size} bytes of {expected['bytes']}")
    if _sha256(file) != expected["sha256"]:
        raise CheckpointError("hash differs, its content is not what was written")


def _purge(folder: Path, step: int, keep: int) -> None:
    paths = [path for path in list_checkpoints(folder) if _step(path) <= step]
    names = {path.name for path in paths}
    replaced = [path for path in paths if path.suffix == ".old" and path.stem in names]
    paths = [path for path in paths if path not in replaced]
    best = next((path for path in paths if _is_best(path)), None)
    for path in replaced + [path for path in paths[keep:] if path != best]:
        try:
            _remove(path)
        except OSError as error:
            warnings.warn(f"the old checkpoint {path} could not be removed: {error}", stacklevel=3)


def _remove(path: Path) -> None:
    """Delete a checkpoint; if that is cut short, what remains is a leftover, not an unsound checkpoint."""
    if path.exists():
        leftover = path.with_name(path.name + ".tmp")
        shutil.rmtree(leftover, ignore_errors=True)
        os.rename(path, leftover)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()


def _is_best(path: Path) -> bool:
    try:
        return bool(_read_meta(path)["best"])
    except (OSError, CheckpointError):
        return False


def _step(path: Path) -> int | str:
    match = _NAME.match(path.name)
    return int(match[1]) if match else path.name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _meta_digest(meta: dict) -> str:
    text = json.dumps({key: value for key, value in meta.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    import pyaccel
    return {"pyaccel": getattr(pyaccel, "__version__", "unknown"), "torch": torch.__version__,
            "numpy": np.__version__, "python": platform.python_version()}


def _os_error(error: BaseException) -> OSError | None:
    """The failed write behind an exception: torch hides it in the context, safetensors in its text."""
    if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", str(error))):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError):
        error = error.__context__
    return error if isinstance(error, OSError) else None
