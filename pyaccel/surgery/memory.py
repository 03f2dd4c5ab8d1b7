"""Weights and activations of a trained network moved into failing memory, at named layers, and out again."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyaccel.hardware import SramConfig
from pyaccel.nn.memory import NoisyMemory, StoredOutput

KINDS = ("weight", "activation")


def with_noisy_memory(
    model: nn.Module,
    sites: Mapping[str, SramConfig],
    *,
    calibration: Iterable[Tensor] | None = None,
    seed: int = 0,
    mode: str = "dense",
) -> nn.Module:
    """A copy of `model` in which the named weights and outputs lie in failing memory.

    Args:
        sites: bank of each site, `{"features.0/weight": config, "features.2/activation": config}`: qualified name of a
            layer, and what of it is stored. Weights are signed codes with step max|W|/(2^(W-1)-1) and a static mask (one
            chip); outputs are drawn anew at every pass. Outputs are unsigned unless calibration sees negative ones.
        calibration: batches of inputs, needed where outputs are stored: their steps come from the largest value seen.
        seed: the chip. A site's stream is the CRC-32 of its name, so a site draws the same bits whatever the others do.
        mode: "dense" (nested in p: sweeps of the voltage keep their chip) or "sparse".

    Returns:
        A model of the same mode (eval or training). Its state_dict holds steps and pass counters; the names of stored
        weights become `LAYER.parametrizations.weight.original`, those inside stored layers `LAYER.layer....`.

    Raises:
        ValueError for a site that is not there, has no weight, is stored already, or an output without calibration.
    """
    parsed = {site: _parse(model, site) for site in sites}
    noisy = copy.deepcopy(model)
    outputs = [layer for layer, kind in parsed.values() if kind == "activation"]
    ranges = _output_ranges(noisy, outputs, calibration) if outputs else {}
    # Weights first: an output's site replaces the layer that bears the name.
    for site, (layer, kind) in sorted(parsed.items(), key=lambda item: KINDS.index(item[1][1])):
        options = dict(seed=seed, stream=zlib.crc32(site.encode()), mode=mode)
        module = noisy.get_submodule(layer)
        if kind == "weight":
            largest = float(module.weight.detach().abs().max()) if module.weight.numel() else 0.0
            memory = NoisyMemory.calibrated(sites[site], largest, signed=True, redraw=False, **options)
            parametrize.register_parametrization(module, "weight", memory.to(module.weight.device))
        else:
            low, high = ranges[layer]
            memory = NoisyMemory.calibrated(sites[site], max(high, -low), signed=low < 0, redraw=True, **options)
            device = next((p.device for p in noisy.parameters()), torch.device("cpu"))
            _replace(noisy, layer, StoredOutput(module, memory.to(device)).train(module.training))
    return noisy


def without_noisy_memory(model: nn.Module) -> nn.Module:
    """A copy of `model` with every failing memory taken out: parameters, names and outputs as before it was put in."""
    clean = copy.deepcopy(model)
    for name, module in list(clean.named_modules()):
        if isinstance(module, StoredOutput):
            if name:
                _replace(clean, name, module.layer)
            else:
                clean = module.layer
    for module in clean.modules():
        if parametrize.is_parametrized(module, "weight") and any(
            isinstance(p, NoisyMemory) for p in module.parametrizations.weight
        ):
            _own_class(module)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            for name in [name for name in module._parameters if name != "weight"]:  # optimizers number parameters by order
                module._parameters[name] = module._parameters.pop(name)
    return clean


def noisy_sites(model: nn.Module) -> dict[str, NoisyMemory]:
    """The failing memories in `model` by site, as `with_noisy_memory` names them, in the order of its modules."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, StoredOutput):
            found[f"{name}/activation"] = module.memory
        if parametrize.is_parametrized(module, "weight"):
            memories = [p for p in module.parametrizations.weight if isinstance(p, NoisyMemory)]
            # A layer whose output is stored as well lies inside the module that bears its name.
            found.update({f"{name.removesuffix('.layer') if _stored(model, name) else name}/weight": m for m in memories})
    return found


def _stored(model: nn.Module, name: str) -> bool:
    return name.endswith(".layer") and isinstance(model.get_submodule(name.removesuffix(".layer")), StoredOutput)


def _parse(model: nn.Module, site: str) -> tuple[str, str]:
    layer, _, kind = site.rpartition("/")
    if kind not in KINDS or not layer:
        raise ValueError(f'with_noisy_memory: a site is "LAYER/weight" or "LAYER/activation", got {site!r}')
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        near = ", ".join(name for name, m in model.named_modules() if name and not list(m.children()))
        raise ValueError(f"with_noisy_memory: the model has no layer {layer!r}; its layers are {near}") from None
    if kind == "weight":
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise ValueError(f"with_noisy_memory: {layer} ({type(module).__name__}) has no weight to store")
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"with_noisy_memory: {layer} has a parametrised weight already; take it off first")
    elif isinstance(module, StoredOutput):
        raise ValueError(f"with_noisy_memory: the output of {layer} is stored already; use without_noisy_memory first")
    return layer, kind


def _output_ranges(model: nn.Module, layers: list[str], batches: Iterable[Tensor] | None) -> dict[str, tuple[float, float]]:
    """Smallest and largest output of each layer over the batches, in evaluation."""
    if batches is None:
        raise ValueError("with_noisy_memory: stored outputs need calibration=, batches of inputs to take their steps from")
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str):
        def hook(_module, _inputs, output):
            if not isinstance(output, Tensor):
                raise ValueError(f"with_noisy_memory: {name} returns {type(output).__name__}, not one tensor to store")
            low, high = ranges.get(name, (0.0, 0.0))
            if output.numel():
                ranges[name] = min(low, float(output.min())), max(high, float(output.max()))

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in layers]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    missing = [name for name in layers if name not in ranges]
    if missing:
        raise ValueError(f"with_noisy_memory: calibration never reached {', '.join(missing)}")
    return ranges


def _own_class(module: nn.Module) -> None:
    """Taking a parametrisation off deletes a property of the class that torch made for it, which deep copies share."""
    shared = type(module)
    content = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
