"""Checkpoints of two papers' official code, read into the networks of this package.

Layouts, as that code writes and reads them:

"bntt" (2010.01729): `{"state_dict", "global_step", "accuracy"}`. Names: `convI.weight`, `fc1.weight`, `fc2.weight`, and
for step t `bnttI.t.` and `bntt_fc.t.` with `weight`, `running_mean`, `running_var`, `num_batches_tracked`.

"hybrid" (2005.01807; also 2003.10399): `{"state_dict", "accuracy", "epoch", "optimizer", ...}`. Names:
`features.N.weight`, `classifier.N.weight` (N counts activations, pooling and dropout too, and differs between versions;
only the order matters here); of residual networks `pre_process.N.weight`, `layerS.B.residual.N.weight`,
`layerS.B.identity.0.weight`, `classifier.0.weight`. A spiking network's file adds `thresholds` (a list, scaled
already), `timesteps` and `leak` or `leak_mem`; where there is `scaling_threshold`, it multiplies the thresholds. An
artificial network's file may have unscaled `thresholds`. Thresholds and leaks in the state dict, `threshold.tN` and
`leak.lN`, are taken too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pyaccel.models.resnet import ResidualBlock, ResidualNet
from pyaccel.models.spiking import SpikingLayer, SpikingNetwork, SpikingVgg
from pyaccel.models.spiking_resnet import SpikingBlock
from pyaccel.models.vgg import VggNet
from pyaccel.nn import BNTTLIF

LAYOUTS = ("bntt", "hybrid")


def load_official(
    model: nn.Module, source: str | os.PathLike | Mapping, layout: str = "bntt", *, threshold_scale: float = 1.0
) -> None:
    """Load a checkpoint of the official code of 2010.01729 ("bntt") or 2005.01807 ("hybrid") into `model`.

    Args:
        model: from `build`. "bntt": a spiking VGG with BNTT; "hybrid": a VGG or residual network, artificial or
            spiking. A spiking network takes over thresholds, leak and time steps that a "hybrid" file has.
        source: the file, read without executing anything in it, or what `torch.load` made of it: a dict, or its state
            dict.
        threshold_scale: multiplies the file's thresholds: an artificial network's file holds unscaled ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that holds no weights; names that are missing or left over and shapes that differ, all of
            them listed; a spiking network's file without its thresholds. The model is then unchanged.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"load_official: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    content = source if isinstance(source, Mapping) else _read(Path(source))
    state = content.get("state_dict", content)
    weights = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError("load_official: no tensors found; expected a state dict or a dict with one under 'state_dict'")
    if layout == "bntt":
        found = _bntt(model, weights)
        neurons = {}
    else:
        weights, settings = _hybrid_settings(content, weights)
        found = _hybrid(model, weights)
        neurons = _neuron_values(model, settings, threshold_scale) if isinstance(model, SpikingNetwork) else {}
    _copy(model, found, weights, layout)
    for neuron, values in neurons.items():
        for name, value in values.items():
            _set(neuron, name, value)
    if isinstance(model, SpikingNetwork) and layout == "hybrid" and "timesteps" in content:
        model.steps = model.encoder.steps = int(content["timesteps"])


def _read(file: Path) -> Mapping:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such checkpoint")
    scalar = np.float64(0).__reduce__()[0]  # accuracies are numpy numbers there; older numpy has another name for it
    harmless = [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype]
    harmless += [type(np.dtype(kind)) for kind in ("float64", "float32", "int64")]
    try:
        with torch.serialization.safe_globals(harmless):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file}: not a checkpoint that holds only tensors and plain values: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected a dict of tensors, got {type(content).__name__}")
    return content


# Of each tensor of the model: the names in the file that it comes from, and how it is made of their tensors.
Sources = dict[str, tuple[list[str], Callable[[list[Tensor]], Tensor]]]


def _only(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _most(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).max()


def _bntt(model: nn.Module, weights: Mapping[str, Tensor]) -> Sources:
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, SpikingLayer)]
    if not isinstance(model, SpikingVgg) or not all(isinstance(layer.neuron, BNTTLIF) for _, layer in layers):
        raise ValueError(
            f"load_official: layout 'bntt' fits a spiking VGG with norm='bntt', got {type(model).__name__}"
        )
    there = 1 + max((int(m[1]) for m in map(re.compile(r"bntt1\.(\d+)\.").match, weights) if m), default=-1)
    if there not in (0, model.steps):
        raise ValueError(
            f"load_official: the file has {there} time steps, the model {model.steps}; build it with steps={there}"
        )
    found: Sources = {"readout.weight": (["fc2.weight"], _only)}
    for i, (name, layer) in enumerate(layers, start=1):
        synapse, norm = (f"conv{i}", f"bntt{i}") if isinstance(layer.synapse, nn.Conv2d) else ("fc1", "bntt_fc")
        found[f"{name}.synapse.weight"] = ([f"{synapse}.weight"], _only)
        for part in ("weight", "running_mean", "running_var", "num_batches_tracked"):
            per_step = [f"{norm}.{t}.{part}" for t in range(layer.neuron.steps)]
            found[f"{name}.neuron.{part}"] = (per_step, _most if part == "num_batches_tracked" else torch.stack)
    return found


def _hybrid(model: nn.Module, weights: Mapping[str, Tensor]) -> Sources:
    if isinstance(model, (VggNet, SpikingVgg)):
        pairs = _vgg_names(model, weights)
    elif isinstance(model, (ResidualNet, SpikingNetwork)):
        pairs = _resnet_names(model)
    else:
        raise ValueError(f"load_official: layout 'hybrid' fits a VGG or residual network, got {type(model).__name__}")
    return {ours: ([theirs], _only) for ours, theirs in pairs.items()}


def _vgg_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, str]:
    def numbered(group: str) -> list[str]:
        names = [m for m in map(re.compile(rf"{group}\.(\d+)\.weight$").match, weights) if m]
        return [m[0] for m in sorted(names, key=lambda m: int(m[1]))]

    pairs: dict[str, str] = {}
    for kind, group in ((nn.Conv2d, "features"), (nn.Linear, "classifier")):
        ours = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, kind)]
        pairs.update(zip(ours, numbered(group), strict=False))
    return pairs


def _resnet_names(model: nn.Module) -> dict[str, str]:
    pairs: dict[str, str] = {}
    stem: list[str] = []
    stage, position = 1, 0
    for name, child in model.features.named_children():
        name = f"features.{name}"
        if isinstance(child, SpikingLayer):
            stem.append(f"{name}.synapse.weight")
        elif isinstance(child, nn.Conv2d):
            stem.append(f"{name}.weight")
        elif isinstance(child, (ResidualBlock, SpikingBlock)):
            convolutions = {f"{name}.{n}.weight": m for n, m in child.named_modules() if isinstance(m, nn.Conv2d)}
            shortcuts = [n for n in convolutions if n.startswith(f"{name}.shortcut")]
            body = [n for n in convolutions if n not in shortcuts]
            if convolutions[body[0]].stride != (1, 1):  # every stage but the first begins by halving the size
                stage, position = stage + 1, 0
            prefix = f"layer{stage}.{position}"
            pairs.update(zip(body, (f"{prefix}.residual.{n}.weight" for n in (0, 3, 6)), strict=False))
            pairs.update((n, f"{prefix}.identity.0.weight") for n in shortcuts)
            position += 1
    pairs.update(zip(stem, (f"pre_process.{n}.weight" for n in (0, 3, 6)), strict=False))
    return pairs | {"readout.weight": "classifier.0.weight"}


def _hybrid_settings(content: Mapping, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """The weights without thresholds and leaks, and these: {"thresholds", "leaks": list or None, "spiking": bool}."""

    def numbered(pattern: str) -> list[float]:
        names = [m for m in map(re.compile(pattern).match, weights) if m]
        return [float(weights[m[0]]) for m in sorted(names, key=lambda m: int(m[1]))]

    thresholds = content.get("thresholds") if content.get("thresholds") is not None else numbered(r"threshold\.t(\d+)$")
    factor = float(content.get("scaling_threshold", 1.0))
    thresholds = [factor * float(v) for v in (thresholds.values() if isinstance(thresholds, Mapping) else thresholds)]
    leak = content.get("leak_mem", content.get("leak"))
    leaks = numbered(r"leak\.l(\d+)$") if leak is None else [float(leak)]
    rest = {name: v for name, v in weights.items() if not re.match(r"(threshold\.t|leak\.l)\d+$", name)}
    return rest, {"thresholds": thresholds, "leaks": leaks, "spiking": "timesteps" in content or bool(leaks)}


def _neuron_values(model: SpikingNetwork, settings: dict, scale: float) -> dict[nn.Module, dict[str, float]]:
    """What each neuron's threshold and leak become."""
    neurons = [m.neuron for m in model.modules() if isinstance(m, SpikingLayer)]
    stem = sum(isinstance(m, SpikingLayer) for m in model.features)  # residual blocks keep their thresholds
    thresholds, leaks = settings["thresholds"], settings["leaks"]
    if settings["spiking"] and not thresholds:
        raise ValueError("load_official: a spiking network's file without thresholds: its weights alone do not work")
    if len(thresholds) not in {0, len(neurons)} | (set() if isinstance(model, SpikingVgg) else {stem}):
        raise ValueError(
            f"load_official: expected {len(neurons)} thresholds, one a spiking layer, got {len(thresholds)}"
        )
    if len(leaks) not in (0, 1, len(neurons)):
        raise ValueError(f"load_official: expected one leak, or {len(neurons)}, got {len(leaks)}")
    if thresholds and any(isinstance(n, BNTTLIF) for n in neurons):
        raise ValueError("load_official: layout 'hybrid' has no BNTT; build the model with neuron='stdb' or 'delayed'")
    leaks = leaks * len(neurons) if len(leaks) == 1 else leaks
    values: dict[nn.Module, dict[str, float]] = {neuron: {} for neuron in neurons}
    for neuron, threshold in zip(neurons, thresholds, strict=False):
        values[neuron]["threshold"] = scale * threshold
    for neuron, leak in zip(neurons, leaks, strict=False):
        values[neuron]["leak"] = leak
    return values


@torch.no_grad()
def _set(neuron: nn.Module, name: str, value: float) -> None:
    old = getattr(neuron, name)
    if isinstance(old, Tensor):
        old.fill_(value)
    else:
        setattr(neuron, name, value)


@torch.no_grad()
def _copy(model: nn.Module, found: Sources, weights: Mapping[str, Tensor], layout: str) -> None:
    """Check all, then copy."""
    own = model.state_dict(keep_vars=True)
    kept = ("threshold", "passes")  # of neurons, encoder and dropout: not weights
    missing = [name for name in own if name not in found and not name.endswith(kept)]
    missing += [name for names, _ in found.values() for name in names if name not in weights]
    used = {name for names, _ in found.values() for name in names}
    left = [name for name in weights if name not in used]
    made = {
        ours: make([weights[n] for n in names])
        for ours, (names, make) in found.items()
        if all(n in weights for n in names)
    }
    shapes = [
        f"{found[o][0][0]} (file {list(t.shape)}, model {list(own[o].shape)})"
        for o, t in made.items()
        if t.shape != own[o].shape
    ]
    problems = [f"{what} {_listed(names)}" for what, names in (("missing:", missing), ("left over:", left),
                                                               ("other shapes:", shapes)) if names]  # fmt: skip
    if problems:
        raise ValueError(f"load_official: layout {layout!r} does not fit {type(model).__name__}: {'; '.join(problems)}")
    for name, tensor in made.items():
        own[name].copy_(tensor)


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
