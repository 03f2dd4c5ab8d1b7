"""Mean activation of every filter, collected while the network trains: no pass of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyaccel.surgery.channels import CARRIERS, channel_map

TOTAL, COUNT = "activation_total", "activation_count"


def watch_activations(model: nn.Module) -> None:
    """From now on, in training mode, `model` adds up what every convolution says after its normalisation and ReLU.

    In place. The sums are buffers (float64 [filters], and the count of values), so that a checkpoint holds them.
    """
    for module in _last_modules(model).values():
        if not hasattr(module, TOTAL):
            like = module.weight if module.weight is not None else module.running_mean
            module.register_buffer(TOTAL, torch.zeros(len(like), dtype=torch.float64, device=like.device))
            module.register_buffer(COUNT, torch.zeros((), dtype=torch.int64, device=like.device))
            module.register_forward_hook(_add)


def activation_means(model: nn.Module) -> dict[str, Tensor]:
    """a_j = mean over images and pixels of relu(channel j), since `watch_activations`: {convolution: [filters]}.

    ValueError for a model that is not watched, or has not trained since.
    """
    found = {}
    for name, module in _last_modules(model).items():
        if not hasattr(module, TOTAL) or not int(getattr(module, COUNT)):
            raise ValueError(
                f"activation_means: nothing was collected for {name}; call watch_activations(model), then train"
            )
        found[name] = getattr(module, TOTAL) / getattr(module, COUNT)
    return found


def unwatch_activations(model: nn.Module) -> None:
    """Take the sums and their hooks out again, in place: the names of the model are as before."""
    for module in model.modules():
        if hasattr(module, TOTAL):
            for key in (TOTAL, COUNT):
                delattr(module, key)
            for handle in [handle for handle, hook in module._forward_hooks.items() if hook is _add]:
                del module._forward_hooks[handle]


def _add(module: nn.Module, _inputs, output: Tensor) -> None:
    if module.training:
        values = F.relu(output.detach())
        getattr(module, TOTAL).add_(values.sum((0, *range(2, values.dim())), dtype=torch.float64))
        getattr(module, COUNT).add_(values.numel() // max(1, values.shape[1]))


def _last_modules(model: nn.Module) -> dict[str, nn.Module]:
    """For each convolution the module whose output its ReLU reads: its normalisation, or itself."""
    graph, found = channel_map(model, "watch_activations").graph, {}
    for node in graph.nodes:
        if node.op == "call_module" and type(module := model.get_submodule(node.target)) is nn.Conv2d:
            users = [user for user in node.users if user.op == "call_module"]
            norms = [model.get_submodule(user.target) for user in users]
            found[node.target] = norms[0] if len(norms) == 1 and type(norms[0]) in CARRIERS else module
    return found
