"""What the tests of the neuron operators share: pairwise covers, memory layouts, and comparisons with honest scales."""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor

from pyaccel import reference
from pyaccel.reference.neuron import state_dtype

RESETS = ("soft", "hard", "none")
SURROGATES = ("triangle", "rectangle", "atan", "sigmoid", "fast_sigmoid")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "time_inside", "offset", "expanded")


def pairwise(**axes) -> list[dict]:
    """Cases in which every value of every axis meets every value of every other axis at least once. Deterministic."""
    names, rng = list(axes), random.Random(0)
    order = {name: list(values) for name, values in axes.items()}
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(order[a]))
        for j in range(len(order[b]))
    }
    cases = []
    while missing:
        (a, i), (b, j) = min(missing, key=lambda pair: (names.index(pair[0][0]), pair))
        row = {a: i, b: j}
        for name in sorted(set(names) - {a, b}, key=names.index):

            def gain(k: int, name=name) -> int:
                return sum(_pair(names, (name, k), other) in missing for other in row.items())

            candidates = list(range(len(order[name])))
            rng.shuffle(candidates)
            row[name] = max(candidates, key=gain)
        missing -= {_pair(names, x, y) for x, y in itertools.combinations(row.items(), 2)}
        cases.append({name: order[name][row[name]] for name in names})
    return cases


def _pair(names, x, y):
    return (x, y) if names.index(x[0]) < names.index(y[0]) else (y, x)


def label(case: dict) -> str:
    return "-".join(str(v).replace("torch.", "") for v in case.values())


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The same values (expanded: of the first batch item), laid out in memory in another way."""
    if layout == "channels_last" and tensor.dim() == 5:
        return tensor.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "time_inside" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "offset":
        flat = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)
        flat[1:] = tensor.reshape(-1)
        return flat[1:].view(tensor.shape)
    if layout == "expanded" and tensor.dim() > 1 and tensor.shape[1] > 0:
        return tensor[:, :1].expand(tensor.shape)
    return tensor.contiguous()


def leaf(tensor: Tensor) -> Tensor:
    """A leaf that requires grad and keeps the strides."""
    return tensor.detach().requires_grad_()


def parameter(kind: str, step: tuple[int, ...], dtype: torch.dtype, low: float, high: float, seed: int) -> float | Tensor:
    """A number, a learnable 0-d tensor, or a learnable tensor of one value a channel (0-d where there are no channels)."""
    generator = torch.Generator().manual_seed(seed)
    state = state_dtype(dtype)
    if kind == "number":
        return low + (high - low) * 0.37
    if kind == "channel" and len(step) >= 2:
        return (low + (high - low) * torch.rand(step[1], generator=generator, dtype=state)).requires_grad_()
    return torch.tensor(low + (high - low) * 0.61, dtype=state, requires_grad=True)


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, scale: float | None = None, what: str = "") -> None:
    """Within 3e-5 (float64: 1e-10) of the largest entry, or of `scale`, plus one unit in the last place of a 16-bit dtype."""
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, what
    if wanted.numel() == 0:
        return
    got, wanted = got.double(), wanted.double()
    assert torch.isfinite(wanted).all(), what
    largest = float(wanted.abs().max()) if scale is None else scale
    bound = (1e-10 if dtype == torch.float64 else 3e-5) * largest
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 0.0)
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0  # spacing of subnormals
    error = (got - wanted).abs() - rounding * wanted.abs() - smallest
    assert float(error.max()) <= bound, f"{what}: off by {float((got - wanted).abs().max()):.3g}, largest {largest:.3g}"


def assert_spikes_match(got: Tensor, wanted: Tensor, margin: Tensor, band: float, most: float = 0.02) -> Tensor:
    """Spike trains [T, ...] agree but for neurons whose first difference happens within `band` of the threshold.

    margin: u - threshold of the wanted run. A neuron is compared up to its first flip; at most a share `most` of the
    neurons may flip. Returns which neurons never differ.
    """
    different = (got != wanted).flatten(1)
    flipped = different.any(0)
    first = different.to(torch.int8).argmax(0)
    at_first = margin.flatten(1).abs().gather(0, first[None])[0]
    outside = flipped & ~(at_first <= band)  # a NaN margin is outside
    assert not outside.any(), f"{int(outside.sum())} neurons differ first at |u - threshold| > {band}"
    assert int(flipped.sum()) <= most * flipped.numel(), f"{int(flipped.sum())} of {flipped.numel()} neurons flipped"
    return ~flipped.view(wanted.shape[1:])


def parameter_shares(x: Tensor, membrane: Tensor | None, grads, leak, threshold, **options) -> tuple[Tensor, Tensor]:
    """What every neuron and step contributes to dL/dleak and dL/dthreshold, [T, N] in float64, by the twin step by step."""
    T, step = x.shape[0], x.shape[1:]
    n = step.numel()

    def spread(value):
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        value = value.reshape(1, -1, *[1] * (len(step) - 2)) if value.dim() else value
        return [value.expand(step).reshape(n).clone().requires_grad_() for _ in range(T)]

    leaks, thresholds = spread(leak), spread(threshold)
    v = torch.zeros(1, n, dtype=torch.float64) if membrane is None else membrane.detach().double().reshape(1, n)
    grad_spikes, grad_membrane = grads
    total = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        now = x[t].detach().double().reshape(1, 1, n)
        s, v = reference.lif(now, v, leak=leaks[t], threshold=thresholds[t], **options)
        total = total + (s * grad_spikes[t].double().reshape(1, 1, n)).sum()
    total = total + (v * grad_membrane.double().reshape(1, n)).sum()
    found = torch.autograd.grad(total, [*leaks, *thresholds], allow_unused=True)
    found = [torch.zeros(n, dtype=torch.float64) if g is None else g for g in found]
    return torch.stack(found[:T]), torch.stack(found[T:])


def primitive(a: Tensor, surrogate: str, scale: float, width: float) -> Tensor:
    """The function whose derivative phi(a) is: what the spike is replaced by in the backward pass."""
    if surrogate == "triangle":
        inside = scale * (a - a * a.abs() / (2 * width))
        return torch.where(a.abs() < width, inside, scale * width / 2 * a.sign())
    if surrogate == "rectangle":
        return scale / width * a.clamp(-width / 2, width / 2)
    if surrogate == "atan":
        return scale / torch.pi * torch.atan(torch.pi / 2 * width * a)
    if surrogate == "sigmoid":
        return scale / (1 + torch.exp(-width * a))
    return scale * a / (1 + width * a.abs())


def central_difference(u: Tensor, threshold: float, surrogate: str, scale: float, width: float, h: float = 1e-6) -> Tensor:
    """d primitive(u/threshold - 1) / du in float64."""
    up, down = ((u + d) / threshold - 1 for d in (h, -h))
    return (primitive(up, surrogate, scale, width) - primitive(down, surrogate, scale, width)) / (2 * h)
