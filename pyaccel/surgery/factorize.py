"""`factorize`: convolutions kept as growing factors, for tasks one after another; `merge_factors`: and back."""

from __future__ import annotations

import copy

from torch import nn

from pyaccel.nn.factorized import FactorizedConv2d
from pyaccel.nn.task_norm import TaskBatchNorm2d


def factorize(model: nn.Module) -> nn.Module:
    """A copy of `model` whose `nn.Conv2d` layers are `nn.FactorizedConv2d` with fresh factors of full rank.

    The factors are drawn from torch's global generator; no singular values of the old weights are used (2009.01956).
    The whole copy must stay as it is once a task is finished: `nn.BatchNorm2d` becomes `TaskBatchNorm2d` with fresh
    values (statistics of each task's own), and nothing else may have parameters or buffers.

    Raises:
        ValueError: a layer that every task would change, by name: a bias, a linear layer (give each task its own
            read-out outside the model), another normalisation, batch normalisation without gain or running averages;
            a convolution with groups or a padding mode other than zeros; a model without convolutions.
    """
    problems = []
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    norms = {name: m for name, m in model.named_modules() if type(m) is nn.BatchNorm2d and _standard(m)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.bias is not None:
                problems.append(f"{name} has a bias, which every task would change: build it with bias=False")
            if module.groups != 1 or module.padding_mode != "zeros":
                problems.append(f"{name} has groups or a padding mode, for which there is no factorised form")
        elif name not in norms and (
            next(module.parameters(recurse=False), None) is not None
            or next(module.buffers(recurse=False), None) is not None
        ):
            problems.append(
                f"{name} ({type(module).__name__}) holds values that every task would change: earlier tasks would be "
                "forgotten; use no normalisation but BatchNorm2d with gain and running averages, and read-outs of each "
                "task's own"
            )
    if not layers:
        problems.append("it has no Conv2d")
    if problems:
        raise ValueError(f"factorize: cannot factorise {type(model).__name__}: {'; '.join(problems)}")

    def factorised(layer: nn.Conv2d) -> FactorizedConv2d:
        new = FactorizedConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            device=layer.weight.device, dtype=layer.weight.dtype,
        )  # fmt: skip
        return new.train(layer.training)

    made: dict[str, nn.Module] = {name: factorised(layer) for name, layer in layers.items()}
    made |= {name: _of_tasks(norm) for name, norm in norms.items()}
    return _replaced(model, made)


def merge_factors(model: nn.Module, task: int | None = None) -> nn.Module:
    """A copy of `model` with ordinary layers: every `FactorizedConv2d` as its merged weight for `task`.

    What a finished task is served from: the ranks of all tasks before it cost nothing. None: all entries and slots.
    A network with batch normalisation is to be served in evaluation.
    """
    new: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, FactorizedConv2d):
            new[name] = module.dense(task).train(module.training)
        elif isinstance(module, TaskBatchNorm2d):
            new[name] = module.ordinary(task).train(module.training)
    return _replaced(model, new)


def _standard(norm: nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _of_tasks(norm: nn.BatchNorm2d) -> TaskBatchNorm2d:
    kind = {"device": norm.weight.device, "dtype": norm.weight.dtype}
    return TaskBatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum, **kind).train(norm.training)


def _replaced(model: nn.Module, new: dict[str, nn.Module]) -> nn.Module:
    if "" in new:
        return new[""]
    made = copy.deepcopy(model)
    for name, layer in new.items():
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, layer)
    return made
