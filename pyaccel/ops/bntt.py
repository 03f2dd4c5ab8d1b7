"""`bntt_lif`: batch normalisation through time and the neuron behind it, in one kernel forward and one backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.ops import checks, options
from pyaccel.ops.library import register
from pyaccel.ops.packing import pack_spikes
from pyaccel.reference.neuron import state_dtype

WHOLE, SUMS_ONLY, SUMS_GIVEN = range(3)  # phases of the backward kernel, csrc/neuron/neuron.h


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
    reset: str = "soft",
    detach_reset: bool = True,
    surrogate: str = "triangle",
    surrogate_scale: float | None = None,
    surrogate_width: float | None = None,
    packed: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch normalisation through time (BNTT, 2010.01729 section "BNTT"), then LIF neurons::

        y[t] = weight[t, c] * (current[t] - mean[t, c]) / sqrt(var[t, c] + eps)
        u[t] = leak * v[t-1] + y[t];   s[t] = u[t] > threshold;   v[t] = reset(u[t])      (see `lif`)

    Every step and channel has statistics and a weight of its own; there is no bias.

    Args:
        current: `[T, B, C, ...]`, contiguous or channels-last, float32, bfloat16, float16 or float64.
        weight: `[T, C]`, float32 (float64 for float64).
        membrane: as in `lif`.
        mean, var: `[T, C]` to use given statistics (inference); both None: batch statistics, the variance biased.
        packed: return the spikes as bits, uint8 `[T, ceil(N / 8)]` (see `pack_spikes`); inference only.
        reduce: for statistics over several processes: a function that returns the sum over the processes of a float64
            tensor (as `all_reduce` does). It is called once in forward, with `[3, T, C]` (how many values, their sum, the
            sum of their squares), and once in backward, with
            `[2, T, C]`; gradients of weight, leak and threshold stay local sums, as DistributedDataParallel expects.

    Returns:
        spikes, membrane, mean, var. The statistics are those used, of the state dtype, without gradient: gradients of a
        batch statistic are already part of the gradient of `current`. Update running statistics from them yourself
        (`nn.BNTTLIF` does).

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    checks.floating("bntt_lif", "current", current, 3, "[T, B, C, ...]")
    state, grid = state_dtype(current.dtype), (current.shape[0], current.shape[2])
    checks.like("bntt_lif", "weight", weight, grid, state, current.device)
    if membrane is not None:
        checks.like("bntt_lif", "membrane", membrane, current.shape[1:], state, current.device)
    if (mean is None) != (var is None):
        raise ValueError("bntt_lif: mean and var must be given together, or both left out for batch statistics")
    for name, statistic in (("mean", mean), ("var", var)):
        if statistic is not None:
            checks.like("bntt_lif", name, statistic, grid, state, current.device)
            if statistic.requires_grad:
                raise ValueError(f"bntt_lif: {name} must not require grad: given statistics are constants; detach() it")
    neuron = options.neuron_arguments(
        "bntt_lif", current, leak, threshold, reset, detach_reset, False, surrogate, surrogate_scale, surrogate_width
    )
    arguments = (current, weight, membrane, mean, var, *neuron, checks.number("bntt_lif", "eps", eps, above=0.0))
    if packed:
        tracked = (current, weight, membrane, neuron[0], neuron[1])
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tracked):
            raise ValueError("bntt_lif: packed spikes carry no gradient; call it under torch.no_grad()")
        return _bntt_lif_packed(*arguments)
    if reduce is not None and mean is None:
        return _Synchronised.apply(reduce, *arguments)
    return _bntt_lif(*arguments)


def bntt_statistics(current: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[T, C]` of `current` `[T, B, C, ...]` over batch and pixels, without gradient."""
    checks.floating("bntt_statistics", "current", current, 3, "[T, B, C, ...]")
    return _bntt_statistics(current.detach())


class _Synchronised(torch.autograd.Function):
    """`bntt_lif` with statistics summed over processes: the same kernels in two steps, one collective between them."""

    @staticmethod
    def forward(ctx, reduce, current, weight, membrane, _mean, _var, *rest):
        mean, var = (s.double() for s in _bntt_statistics(current))
        here = current.shape[1] * math.prod(current.shape[3:])
        count = torch.full_like(mean, here)
        sums = [count * mean, count * (var + mean * mean)] if here else [count, count]  # nothing has no mean
        totals = reduce(torch.stack([count, *sums]))
        mean, square = totals[1] / totals[0], totals[2] / totals[0]
        var = (square - mean * mean).clamp_min(0)
        spikes, membrane_out, mean, var = _bntt_lif(current, weight, membrane, mean.to(weight.dtype), var.to(weight.dtype), *rest)
        ctx.save_for_backward(current, weight, membrane, mean, var, totals[0], rest[0], rest[1])
        ctx.rest, ctx.reduce = rest[2:], reduce
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return spikes, membrane_out, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_spikes, grad_membrane, _mean, _var):
        current, weight, membrane, mean, var, count, leak_tensor, threshold_tensor = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [needs[1], needs[2], needs[3], needs[6], needs[7]]
        if grad_spikes is None and grad_membrane is None:
            return (None,) * len(needs)
        arguments = (grad_spikes, grad_membrane, current, weight, membrane, mean, var, leak_tensor, threshold_tensor, *ctx.rest)
        # Local parameter gradients come from the local sums, the input's from everybody's.
        first = _bntt_lif_backward(*arguments, True, wanted, SUMS_ONLY, None, 0.0)
        means = (ctx.reduce(first[5].double()) / count).to(weight.dtype)  # divided here: a GPU need not be waited for
        second = _bntt_lif_backward(*arguments, True, wanted, SUMS_GIVEN, means, 1.0)
        found = [second[0], first[1], second[2], *second[3:5]]
        found = [g if needed else None for g, needed in zip(found, wanted, strict=True)]
        return (None, *found[:3], None, None, *found[3:], *(None,) * len(ctx.rest))


def _scratch(current: Tensor, backward: bool) -> Tensor | None:
    size = extension._C.neuron.bntt_scratch_bytes(current, backward)
    return current.new_empty(size, dtype=torch.uint8) if size else None


def _outputs(current: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state, grid = state_dtype(current.dtype), (current.shape[0], current.shape[2])
    statistics = (current.new_empty(grid, dtype=state) for _ in range(2))
    return torch.empty_like(current), options.step_like(current, state), *statistics


def _kernel(current, weight, membrane, mean, var, leak_tensor, threshold_tensor, neuron, eps):
    current = options.dense(current)
    membrane = options.in_layout_of(membrane, current)
    spikes, membrane_out, mean_out, var_out = _outputs(current)
    if mean is not None:
        mean_out.copy_(mean)
        var_out.copy_(var)
    if current.numel() == 0:
        if mean is None:
            mean_out.fill_(float("nan")), var_out.fill_(float("nan"))
        membrane_out.zero_() if membrane is None else membrane_out.copy_(membrane)
        return spikes, membrane_out, mean_out, var_out
    extension._C.neuron.bntt_forward(
        current, weight.contiguous(), membrane, *options.per_channel(current, True, leak_tensor, threshold_tensor), neuron,
        eps, mean is None, False, mean_out, var_out, spikes, membrane_out, _scratch(current, False),
    )  # fmt: skip
    return spikes, membrane_out, mean_out, var_out


def _fake(current, weight, membrane, mean, var, *rest):
    return _outputs(options.dense(current))


def _fallback(current, weight, membrane, mean, var, leak_tensor, threshold_tensor, neuron, eps):
    keywords = options.keywords(leak_tensor, threshold_tensor, neuron)
    del keywords["delay"]
    out = _outputs(options.dense(current))
    twin = reference.bntt_lif(current, weight, membrane, mean=mean, var=var, eps=eps, **keywords)
    return tuple(o.copy_(t) for o, t in zip(out, twin, strict=True))


def _setup_context(ctx, inputs, output):
    current, weight, membrane, given_mean, _, leak_tensor, threshold_tensor, ctx.neuron, ctx.eps = inputs
    _, _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(current, weight, membrane, mean, var, leak_tensor, threshold_tensor)
    ctx.batch_statistics = given_mean is None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_spikes, grad_membrane, _mean, _var):
    nothing = (None,) * 9
    if grad_spikes is None and grad_membrane is None:
        return nothing
    current, weight, membrane, mean, var, leak_tensor, threshold_tensor = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs = [needs[0], needs[1], needs[2], needs[5], needs[6]]
    found = _bntt_lif_backward(
        grad_spikes, grad_membrane, current, weight, membrane, mean, var, leak_tensor, threshold_tensor, ctx.neuron, ctx.eps,
        ctx.batch_statistics, [bool(n) for n in needs], WHOLE, None, 0.0,
    )  # fmt: skip
    found = [g if needed else None for g, needed in zip(found[:5], needs, strict=True)]
    return (*found[:3], None, None, *found[3:], *nothing[7:])


def _gradients(current, weight, leak_tensor, threshold_tensor, wanted, phase) -> tuple[Tensor, ...]:
    state = state_dtype(current.dtype)
    return (
        torch.empty_like(current),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        options.step_like(current, state) if wanted[2] else current.new_empty(0, dtype=state),
        torch.empty_like(leak_tensor) if wanted[3] else current.new_empty(0, dtype=state),
        torch.empty_like(threshold_tensor) if wanted[4] else current.new_empty(0, dtype=state),
        weight.new_empty((2, *weight.shape)) if phase == SUMS_ONLY else current.new_empty(0, dtype=state),
    )


def _backward_kernel(
    grad_spikes, grad_membrane, current, weight, membrane, mean, var, leak_tensor, threshold_tensor, neuron, eps, batch_statistics,
    wanted, phase, sums, count,
):  # fmt: skip
    current = options.dense(current)
    out = _gradients(current, weight, leak_tensor, threshold_tensor, wanted, phase)
    if current.numel() == 0:
        for o in out:
            o.zero_()
        if wanted[2] and grad_membrane is not None:  # no steps: the state passed through
            out[2].copy_(grad_membrane)
        return out
    channels = [current.new_empty(current.shape[2], dtype=weight.dtype) if w else None for w in wanted[3:]]
    extension._C.neuron.bntt_backward(
        current, weight.contiguous(), options.in_layout_of(membrane, current),
        *options.per_channel(current, True, leak_tensor, threshold_tensor), neuron, eps, batch_statistics, mean, var,
        options.sequence_in_layout_of(grad_spikes, current),
        options.in_layout_of(grad_membrane, current), phase, out[5] if phase == SUMS_ONLY else sums, count,
        None if phase == SUMS_ONLY else out[0], None if phase == SUMS_GIVEN else out[1], out[2] if wanted[2] else None,
        *channels, _scratch(current, True),
    )  # fmt: skip
    parameters = (leak_tensor, threshold_tensor)
    learned = [
        (c if p.dim() else c.sum()) if w else o
        for c, p, w, o in zip(channels, parameters, wanted[3:], out[3:5], strict=True)
    ]  # fmt: skip
    return (*out[:3], *learned, out[5])


def _backward_fake(grad_spikes, grad_membrane, current, weight, membrane, mean, var, leak_tensor, threshold_tensor, *rest):
    return _gradients(options.dense(current), weight, leak_tensor, threshold_tensor, rest[-4], rest[-3])


def _backward_fallback(
    grad_spikes, grad_membrane, current, weight, membrane, mean, var, leak_tensor, threshold_tensor, neuron, eps, batch_statistics,
    wanted, phase, sums, count,
):  # fmt: skip
    if phase != WHOLE:
        raise NotImplementedError("bntt_lif: statistics over several processes need the compiled kernels")
    out = _gradients(options.dense(current), weight, leak_tensor, threshold_tensor, wanted, phase)
    with torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_() for t in (current, weight, membrane, leak_tensor, threshold_tensor)]
        keywords = options.keywords(leaves[3], leaves[4], neuron)
        del keywords["delay"]
        given = {} if batch_statistics else dict(mean=mean, var=var)
        twin = reference.bntt_lif(leaves[0], leaves[1], leaves[2], eps=eps, **given, **keywords)[:2]
        pairs = [(o, g) for o, g in zip(twin, (grad_spikes, grad_membrane), strict=True) if g is not None]
        asked = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
        found = iter(torch.autograd.grad([o for o, _ in pairs], asked, [g for _, g in pairs], allow_unused=True))
    for buffer, w in zip(out[:5], wanted, strict=True):
        if w:
            gradient = next(found)
            buffer.zero_() if gradient is None else buffer.copy_(gradient)
    return out


def _packed_outputs(current: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, membrane, mean, var = _outputs(current)
    row = math.prod(current.shape[1:])
    return current.new_empty((current.shape[0], (row + 7) // 8), dtype=torch.uint8), membrane, mean, var


def _packed_kernel(current, weight, membrane, mean, var, leak_tensor, threshold_tensor, neuron, eps):
    current = options.dense(current.contiguous())  # bits are counted in logical order
    if current.numel() == 0 or not extension._C.neuron.bntt_packs_in_place(current):
        spikes, *others = _kernel(current, weight, membrane, mean, var, leak_tensor, threshold_tensor, neuron, eps)
        return pack_spikes(spikes), *others
    bits, membrane_out, mean_out, var_out = _packed_outputs(current)
    if mean is not None:
        mean_out.copy_(mean)
        var_out.copy_(var)
    extension._C.neuron.bntt_forward(
        current, weight.contiguous(), options.in_layout_of(membrane, current),
        *options.per_channel(current, True, leak_tensor, threshold_tensor), neuron, eps, mean is None, True, mean_out, var_out,
        bits, membrane_out, _scratch(current, False),
    )  # fmt: skip
    return bits, membrane_out, mean_out, var_out


def _packed_fake(current, *rest):
    return _packed_outputs(current.contiguous())


def _packed_fallback(current, *rest):
    spikes, *others = _fallback(current.contiguous(), *rest)
    return pack_spikes(spikes), *others


def _statistics_kernel(current):
    current = options.dense(current)
    _, _, mean, var = _outputs(current)
    if current.numel() == 0:
        return mean.fill_(float("nan")), var.fill_(float("nan"))
    extension._C.neuron.bntt_statistics(current, mean, var, _scratch(current, False))
    return mean, var


def _statistics_fake(current):
    return _outputs(options.dense(current))[2:]


def _statistics_fallback(current):
    x = current.to(state_dtype(current.dtype))
    over = [1, *range(3, x.dim())]
    return x.mean(over), x.var(over, correction=0)


_bntt_statistics = register(
    "bntt_statistics(Tensor current) -> (Tensor, Tensor)",
    kernel=_statistics_kernel,
    fake=_statistics_fake,
    fallback=_statistics_fallback,
)
_bntt_lif_packed = register(
    "bntt_lif_packed(Tensor current, Tensor weight, Tensor? membrane, Tensor? mean, Tensor? var, "
    f"{options.SCHEMA}, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_packed_kernel,
    fake=_packed_fake,
    fallback=_packed_fallback,
)
_bntt_lif_backward = register(
    "bntt_lif_backward(Tensor? grad_spikes, Tensor? grad_membrane, Tensor current, Tensor weight, Tensor? membrane, Tensor mean, "
    f"Tensor var, {options.SCHEMA}, float eps, bool batch_statistics, bool[] wanted, int phase, "
    "Tensor? sums, float count) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    fallback=_backward_fallback,
)
_bntt_lif = register(
    "bntt_lif(Tensor current, Tensor weight, Tensor? membrane, Tensor? mean, Tensor? var, "
    f"{options.SCHEMA}, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    fallback=_fallback,
    setup_context=_setup_context,
    backward=_backward,
)
