"""`widen` and `deepen`: a larger network that computes the same function (Net2Net, arXiv 1511.05641).

As adopted by cumulative training (2003.01204); the specification's section 2 has the equations and what was measured.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from pyaccel.surgery.channels import CARRIERS, ChannelMap, channel_map
from pyaccel.surgery.reindex import Places, carried_optimizer, gather, places


def widen(
    model: nn.Module,
    layer: str,
    width: int,
    *,
    split: str = "uneven",
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
):
    """A copy of `model` whose `layer` has `width` outputs, and which computes the same (Net2Wider).

    With g(j) = j for old units and a random old one for new units, and shares r_j that add up to 1 over the copies of a
    unit::

        W_A'[j] = W_A[g(j)], b_A'[j] = b_A[g(j)];  batch normalisation: everything copied by g, nothing divided
        W_B'[:, j] = r_j W_B[:, g(j)] in every layer B that reads it (behind a flattening: its block of columns)

    All layers whose channels are added to these are widened alike; concatenations keep their places.

    Args:
        layer: qualified name of a convolution or linear layer.
        split: "uneven": shares drawn from u_j / sum u, u ~ U(0.5, 1.5), so that copies learn apart; "even": 1/c, as in
            the paper: copies then have the same gradients for ever, unless something else (dropout, noise) parts them.
        optimizer: carried along: state of copies is copied by g, undivided.

    Returns:
        The copy; with `optimizer`, (copy, new optimizer).

    Raises:
        ValueError: an unknown layer; channels that cannot change, with the reason; a width below the present one.
    """
    channels = channel_map(model, "widen")
    if layer not in channels.writes:
        raise ValueError(
            f"widen: the model uses no convolution or linear layer {layer!r}; it has {', '.join(channels.writes)}"
        )
    space = channels.writes[layer].root()
    if space.frozen:
        raise ValueError(f"widen: cannot widen {layer}: its channels are fixed: {space.frozen}")
    if width < space.size:
        raise ValueError(
            f"widen: {layer} has {space.size} outputs already, got width {width}; prune_filters makes it smaller"
        )
    if split not in ("uneven", "even"):
        raise ValueError(f"widen: split must be uneven or even, got {split!r}")
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(space.size, (width - space.size,), generator=generator)
    source = torch.cat([torch.arange(space.size), extra])
    parts = torch.ones(width, dtype=torch.float64)
    if split == "uneven":
        parts = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
    shares = parts / torch.zeros(space.size, dtype=torch.float64).index_add_(0, source, parts)[source]

    chosen = {space: source}
    moves = places(model, channels, chosen)
    wider = copy.deepcopy(model)
    gather(wider, moves)
    with torch.no_grad():
        for name in channels.readers(space):
            weight = wider.get_submodule(name).weight
            share = channels.reads[name].index(chosen, {space: shares}).to(weight.device)
            weight.copy_(weight.double() * share.view(1, -1, *[1] * (weight.dim() - 2)))
    if optimizer is None:
        return wider
    return wider, carried_optimizer(optimizer, model, wider, moves, "widen")


def deepen(
    model: nn.Module,
    after: str,
    *,
    calibration: Tensor | None = None,
    kernel: int = 3,
    norm: bool | None = None,
    optimizer: torch.optim.Optimizer | None = None,
):
    """A copy of `model` with one more layer behind the ReLU of `after`, which computes the same (Net2Deeper).

    An identity convolution (or linear layer) without bias, batch normalisation, ReLU. Exact since relu(relu(x)) =
    relu(x). The normalisation undoes itself: with mean mu and variance v of the activation over `calibration`, in
    training mode, running_mean = mu, running_var = v, gamma = sqrt(v + eps), beta = mu; so that also training starts
    from this function, up to how far the statistics of its batches differ from these.

    Args:
        after: qualified name of an `nn.ReLU`, or of the layer whose ReLU it is.
        calibration: a batch of inputs, as large as training batches; needed where there is normalisation.
        kernel: odd, of a convolution.
        norm: with normalisation; None: if there is one before that ReLU.
        optimizer: carried along; the new parameters enter the group of the layer before them, without state.

    Returns:
        The copy, in which the ReLU has become `nn.Sequential(relu, layer, norm, relu)`: all other names stay. With
        `optimizer`, (copy, new optimizer).

    Raises:
        ValueError: an unknown name; no ReLU behind it, or one that is a function or used twice; no calibration.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"deepen: kernel must be odd, got {kernel}")
    channels = channel_map(model, "deepen")
    node = _relu_of(model, channels, after)
    layout, before = channels.values[node], node.args[0]
    width = layout.channels() * layout.block if layout is not None and layout.flat and layout.block else None
    if layout is not None and layout.flat is False:
        width = layout.channels()
    if width is None:
        raise ValueError(f"deepen: cannot tell how many channels pass through {node.target}; choose another place")
    previous = model.get_submodule(before.target) if before.op == "call_module" else None
    norm = type(previous) in CARRIERS if norm is None else norm
    if norm and calibration is None:
        raise ValueError(
            "deepen: a layer with normalisation needs calibration=, a batch of inputs as large as those of training; "
            "without it training would not start from the same function"
        )
    like = next(model.parameters())
    inserted = _identity(width, bool(layout.flat), kernel, norm).to(like.device, like.dtype)
    if norm:
        _calibrate(model, node.target, inserted[1], calibration)
    deeper = copy.deepcopy(model)
    parent, _, child = node.target.rpartition(".")
    relu = deeper.get_submodule(node.target)
    setattr(deeper.get_submodule(parent), child, nn.Sequential(relu, *inserted).train(relu.training))
    if optimizer is None:
        return deeper
    neighbour = next(n for n, w in channels.writes.items() if w.root() is layout.parts[0].root()) + ".weight"
    new = {name: neighbour for name, _ in deeper.named_parameters() if name.startswith(f"{node.target}.")}
    return deeper, carried_optimizer(optimizer, model, deeper, Places(), "deepen", beside=new)


def _relu_of(model: nn.Module, channels: ChannelMap, after: str) -> fx.Node:
    modules = dict(model.named_modules())
    if after not in modules:
        raise ValueError(f"deepen: the model has no layer {after!r}")
    while isinstance(modules[after], nn.Sequential) and len(modules[after]):
        after = f"{after}.{list(dict(modules[after].named_children()))[-1]}" if after else list(modules)[-1]
    nodes = [node for node in channels.graph.nodes if node.op == "call_module" and node.target == after]
    if not nodes:
        raise ValueError(f"deepen: the model does not call {after} as one layer")
    node = nodes[0]
    while node.op != "call_module" or type(modules[node.target]) is not nn.ReLU:
        passes = node.op == "call_module" and type(modules[node.target]) in (nn.Conv2d, nn.Linear, *CARRIERS)
        if not passes or len(node.users) != 1:
            found = (
                f"{len(node.users)} readers" if passes else str(node.target if node.op == "call_module" else node.name)
            )
            raise ValueError(
                f"deepen: {after} is not followed by a ReLU of its own but by {found}; only behind nn.ReLU, a module, "
                "is an inserted layer without effect"
            )
        (node,) = node.users
    if sum(n.op == "call_module" and modules[n.target] is modules[node.target] for n in channels.graph.nodes) > 1:
        raise ValueError(f"deepen: {node.target} is used more than once; give this place an nn.ReLU of its own")
    return node


def _identity(width: int, flat: bool, kernel: int, norm: bool) -> nn.Sequential:
    if flat:
        layer: nn.Module = nn.Linear(width, width, bias=False)
        nn.init.eye_(layer.weight)
    else:
        layer = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)
        nn.init.dirac_(layer.weight)
    parts = [layer, (nn.BatchNorm1d if flat else nn.BatchNorm2d)(width)] if norm else [layer]
    return nn.Sequential(*parts, nn.ReLU())


def _calibrate(model: nn.Module, relu: str, norm: nn.Module, batch: Tensor) -> None:
    """Statistics of what `relu` says about the batch, in training mode but without dropout."""
    probe = copy.deepcopy(model).train()
    for module in probe.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.eval()
    seen: list[Tensor] = []
    probe.get_submodule(relu).register_forward_hook(lambda m, inputs, output: seen.append(output.detach().double()))
    with torch.no_grad():
        probe(batch)
        axes = (0, *range(2, seen[0].dim()))
        mean, var = seen[0].mean(axes), seen[0].var(axes, correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)
