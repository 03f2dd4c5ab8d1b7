"""Weights in safetensors files: names and tensors, no pickle; readable by every safetensors library."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .durable import sync_file, sync_folder


def save_weights(model: nn.Module, file: str | os.PathLike) -> None:
    """Write the parameters and persistent buffers of `model` to one safetensors file, with a SHA-256 of their content.

    A wrapper of torch.compile or DistributedDataParallel is looked through. Written aside, synced, renamed.
    """
    file = Path(file)
    tensors, ties = named_tensors(model)
    temporary = file.with_name(file.name + ".tmp")
    try:
        write_tensors(temporary, tensors, {"ties": ties, "sha256": _digest(tensors, ties)})
        sync_file(temporary)
        os.replace(temporary, file)
        sync_folder(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(model: nn.Module, file: str | os.PathLike) -> None:
    """Copy the weights in a safetensors file into `model`, every name, shape and dtype equal.

    The content is checked against the SHA-256 of `save_weights`; files of other programs hold none and load unchecked.
    FileNotFoundError, or ValueError for a damaged file and for names, shapes or dtypes that differ (all are listed).
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of weights")
    try:
        tensors, notes = read_tensors(file)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: not a sound safetensors file: {error}") from error
    if "sha256" in notes and notes["sha256"] != _digest(tensors, notes["ties"]):
        raise ValueError(f"{file}: its content differs from the SHA-256 that was written with it; the file is damaged")
    apply_tensors(model, tensors, str(file))


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and DistributedDataParallel, so that names carry no prefix."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def named_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies of parameters and persistent buffers, contiguous on the CPU, and the ties {name: earlier name of the same}.

    A tied name is left out of the first dict. TypeError for extra state that is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    names: dict[tuple, str] = {}
    for name, tensor in unwrap(model).state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: safetensors holds tensors only, got {type(tensor).__name__}; "
                            "register a buffer instead of extra state")
        view = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
                tensor.dtype, tensor.device)
        if view in names:
            ties[name] = names[view]
            continue
        names[view] = name
        tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors, ties


def write_tensors(file: Path, tensors: dict[str, Tensor], notes: dict) -> None:
    """Write tensors and `notes` for `read_tensors`: {"ties": {name: stored name}, ...}, what JSON can hold.

    The notes are one entry of the file's metadata: safetensors writes several in an order that changes from run to run,
    and equal weights should be equal files.
    """
    save_file(tensors, file, metadata={"pyaccel": json.dumps(notes)})


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors of a file on the CPU, tied names included, and its notes: {} in files of other programs."""
    with safe_open(file, framework="pt") as content:
        notes = json.loads((content.metadata() or {}).get("pyaccel", "{}"))
        tensors = {name: content.get_tensor(name) for name in content.keys()}
    tensors.update({name: tensors[kept] for name, kept in notes.get("ties", {}).items()})
    return tensors, notes


def apply_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters and buffers of the same names; ValueError before any copy if one differs."""
    model = unwrap(model)
    own = model.state_dict()
    problems = [f"{what} {_listed(names)}" for what, names in (
        ("not in the file:", [name for name in own if name not in tensors]),
        ("not in the model:", [name for name in tensors if name not in own]),
        ("different:", [f"{name} (file {_kind(tensors[name])}, model {_kind(own[name])})" for name in own
                        if name in tensors and _kind(tensors[name]) != _kind(own[name])])) if names]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}. "
                         "Build the model with the configuration that the weights were trained with")
    model.load_state_dict(tensors)


def _digest(tensors: dict[str, Tensor], ties: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(ties, sort_keys=True).encode())
    for name in sorted(tensors.keys() - ties.keys()):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
