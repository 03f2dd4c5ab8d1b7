"""Plain-torch twins of the neuron kernels: the definition in a form to be read, the oracle of the tests, and what runs
where no kernel exists. Time loops use `unbind(0)`: indexing `x[t]` makes the backward pass quadratic in T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyaccel.reference.philox import ENCODER, philox

# Default (scale, width) of each surrogate, in the order of their numbers in csrc/neuron/neuron.h.
SURROGATES = {
    "triangle": (0.3, 1.0),
    "rectangle": (1.0, 1.0),
    "atan": (1.0, 2.0),
    "sigmoid": (1.0, 4.0),
    "fast_sigmoid": (1.0, 25.0),
}
RESETS = ("soft", "hard", "none")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Neuron state, statistics and sums: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def surrogate_slope(u: Tensor, threshold: Tensor, surrogate: str, scale: float, width: float) -> Tensor:
    """ds/du = phi(a) / threshold with a = u/threshold - 1, the stand-in for the derivative of the spike `u > threshold`."""
    a = u / threshold - 1
    if surrogate == "triangle":
        height = 1 - a.abs() / width
        phi = scale * torch.where(height > 0, height, 0.0)
    elif surrogate == "rectangle":
        phi = scale / width * (a.abs() < width / 2).to(a.dtype)
    elif surrogate == "atan":
        phi = scale * (width / 2) / (1 + (math.pi / 2 * width * a) ** 2)
    elif surrogate == "sigmoid":
        sig = torch.sigmoid(width * a)
        phi = scale * width * sig * torch.sigmoid(-width * a)
    else:
        phi = scale / (1 + width * a.abs()) ** 2
    return phi / threshold


class _Spike(torch.autograd.Function):
    """1 where u > threshold, else 0; the surrogate is its derivative."""

    @staticmethod
    def forward(ctx, u, threshold, surrogate, scale, width):
        ctx.save_for_backward(u, threshold)
        ctx.surrogate = (surrogate, scale, width)
        return (u > threshold).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        u, threshold = ctx.saved_tensors
        through = grad * surrogate_slope(u, threshold, *ctx.surrogate)
        return through, (-through * u / threshold).sum_to_size(threshold.shape), None, None, None


def _per_neuron(value: float | Tensor, membrane: Tensor) -> Tensor:
    """A parameter as a tensor that broadcasts over one step: 0-d, or one value a channel (dimension 1 of the state)."""
    value = torch.as_tensor(value, dtype=membrane.dtype, device=membrane.device)
    return value if value.dim() == 0 else value.reshape(-1, *[1] * (membrane.dim() - 2))


def lif(
    current: Tensor,
    membrane: Tensor | None = None,
    *,
    leak: float | Tensor = 1.0,
    threshold: float | Tensor = 1.0,
    reset: str = "soft",
    detach_reset: bool = True,
    delay: bool = False,
    surrogate: str = "triangle",
    surrogate_scale: float | None = None,
    surrogate_width: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Twin of `pyaccel.ops.lif`, which documents it."""
    scale = SURROGATES[surrogate][0] if surrogate_scale is None else surrogate_scale
    width = SURROGATES[surrogate][1] if surrogate_width is None else surrogate_width
    state = state_dtype(current.dtype)
    u = current.new_zeros(current.shape[1:], dtype=state) if membrane is None else membrane
    leak, threshold = _per_neuron(leak, u), _per_neuron(threshold, u)

    def after_reset(u: Tensor, s: Tensor) -> Tensor:
        """The prompt neuron's state; for the delayed neuron what is kept before the leak (a soft reset comes after it)."""
        if reset == "none" or (delay and reset == "soft"):
            return u
        return u - taken(s) if reset == "soft" else u * (1 - (s.detach() if detach_reset else s))

    def taken(s: Tensor) -> Tensor:
        return threshold.detach() * s.detach() if detach_reset else threshold * s

    spikes = []
    for x in current.to(state).unbind(0):
        if delay:
            s = _Spike.apply(u, threshold, surrogate, scale, width)
            u = leak * after_reset(u, s) + x
            if reset == "soft":
                u = u - taken(s)
        else:
            u = leak * u + x
            s = _Spike.apply(u, threshold, surrogate, scale, width)
            u = after_reset(u, s)
        spikes.append(s.to(current.dtype))
    return (torch.stack(spikes) if spikes else torch.empty_like(current)), u


def bntt_lif(
    current: Tensor,
    weight: Tensor,
    membrane: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-4,
    leak: float | Tensor = 0.95,
    threshold: float | Tensor = 1.0,
    **neuron,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twin of `pyaccel.ops.bntt_lif`, which documents it."""
    x = current.to(state_dtype(current.dtype))
    over = [1, *range(3, x.dim())]  # statistics of (t, c) over batch and pixels
    if mean is None or var is None:
        mean = x.mean(over)
        var = ((x - _grid(mean, x)) ** 2).mean(over)
    scale = weight * (1 / torch.sqrt(var + eps))
    y = (x - _grid(mean, x)) * _grid(scale, x)
    spikes, membrane = lif(y, membrane, leak=leak, threshold=threshold, **neuron)
    return spikes.to(current.dtype), membrane, mean, var


def _grid(values: Tensor, x: Tensor) -> Tensor:
    """`[T, C]` so that it broadcasts over `[T, B, C, ...]`."""
    return values.reshape(values.shape[0], 1, values.shape[1], *[1] * (x.dim() - 3))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, spikes, gain):
        ctx.gain = gain
        return spikes

    @staticmethod
    def backward(ctx, grad):
        return ctx.gain * grad.sum(0), None, None


def poisson_encode(
    image: Tensor,
    steps: int,
    *,
    gain: float = 1.0,
    seed: int,
    stream: int = 0,
    sample_ids: Tensor | None = None,
    first_step: int = 0,
) -> Tensor:
    """Twin of `pyaccel.ops.poisson_encode`, which documents it."""
    batch, pixels = image.shape[0], image[0].numel() if image.shape[0] else 0
    x = image.detach().to(state_dtype(image.dtype)).reshape(batch, pixels)
    probability = torch.clamp(gain * x.abs(), max=1)
    # floor(P * 2^32): the product is exact in float32; NaN has no probability and never spikes
    limit = torch.where(probability.isnan(), 0.0, probability * 2.0**32).to(torch.int64)
    ids = torch.arange(batch) if sample_ids is None else sample_ids.cpu()
    pixel, step = torch.arange(pixels), torch.arange(first_step, first_step + steps)
    words = philox(seed, (pixel // 4)[None, None], ids[None, :, None], stream, (ENCODER + (step << 8))[:, None, None])
    word = words.take_along_dim((pixel % 4)[None, None, :, None], -1)[..., 0].to(image.device)
    sign = torch.where(x < 0, -1.0, 1.0).to(image.dtype)
    spikes = torch.where(word < limit, sign, 0.0).to(image.dtype).reshape(steps, *image.shape)
    return _Encode.apply(image, spikes, gain)
