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
STDB_FORMS = ("exact", "fp32_underflow")
NEVER = 999  # steps since the last spike of a neuron that has not fired: the official code starts at step -1000


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


def stdb_slope(since: Tensor, threshold: float, alpha: float, beta: float, form: str, dtype: torch.dtype) -> Tensor:
    """ds/du of the spike-time surrogate: alpha * exp(-beta * since) / threshold, or as float32 rounds exp(-since)^beta."""
    if form == "exact":
        return (alpha / threshold) * torch.exp(-beta * since.to(dtype))
    # Two factors, so that the result is rounded to float32's subnormals even where the processor flushes them to zero.
    held = torch.round(torch.exp(-since.double()) * 2.0**149) * 2.0**-149
    held = torch.where(since < 88, torch.exp(-since.double()), held)
    return (alpha / threshold) * (held**beta).to(dtype)


def stdb_lif(
    current: Tensor,
    membrane: Tensor | None = None,
    since: Tensor | None = None,
    *,
    leak: float = 1.0,
    threshold: float = 1.0,
    alpha: float = 0.3,
    beta: float = 0.01,
    form: str = "exact",
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `pyaccel.ops.stdb_lif`, which documents it."""
    state = state_dtype(current.dtype)
    u = current.new_zeros(current.shape[1:], dtype=state) if membrane is None else membrane
    since = torch.full(current.shape[1:], NEVER, dtype=torch.int32, device=current.device) if since is None else since
    spikes = []
    for x in current.to(state).unbind(0):
        slope = stdb_slope(since, threshold, alpha, beta, form, state)
        hard = (u.detach() > threshold).to(state)
        s = hard + slope * (u - u.detach())  # the value of the spike, the derivative of the surrogate
        u = leak * u + x - threshold * hard
        since = torch.where(hard > 0, 1, since + 1).to(torch.int32)
        spikes.append(s.to(current.dtype))
    return (torch.stack(spikes) if spikes else torch.empty_like(current)), u, since


def stdb_backward(
    spikes: Tensor,
    since: Tensor | None,
    grad_spikes: Tensor,
    grad_membrane: Tensor | None,
    *,
    leak: float,
    threshold: float,
    alpha: float,
    beta: float,
    form: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of `stdb_lif`'s current and membrane from its spikes alone (2005.01807; delta[t-1] = g[t]*phi[t] + leak*delta[t])."""
    state = state_dtype(grad_spikes.dtype)
    since = torch.full(spikes.shape[1:], NEVER, dtype=torch.int32, device=spikes.device) if since is None else since
    slopes = []
    for s in spikes.unbind(0):
        slopes.append(stdb_slope(since, threshold, alpha, beta, form, state))
        since = torch.where(s > 0, 1, since + 1).to(torch.int32)
    delta = spikes.new_zeros(spikes.shape[1:], dtype=state) if grad_membrane is None else grad_membrane
    gradients = []
    for g, slope in zip(reversed(grad_spikes.to(state).unbind(0)), reversed(slopes), strict=True):
        gradients.append(delta)
        delta = g * slope + leak * delta
    return (torch.stack(gradients[::-1]).to(grad_spikes.dtype) if gradients else torch.empty_like(grad_spikes)), delta


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
    scale = weight * torch.rsqrt(var + eps)
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
