"""`stdb_lif`: the delayed neuron with the spike-time surrogate; training keeps one bit a neuron-step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.ops import checks, options
from pyaccel.ops.library import register
from pyaccel.ops.packing import plain_pack, plain_unpack
from pyaccel.reference.neuron import STDB_FORMS, state_dtype

# leak and threshold where they are tensors (0-d, float64), then [leak, threshold, alpha, beta, form].
SCHEMA = "Tensor? leak_tensor, Tensor? threshold_tensor, float[] numbers"


def stdb_lif(
    current: Tensor,
    membrane: Tensor | None = None,
    since: Tensor | None = None,
    *,
    leak: float | Tensor = 1.0,
    threshold: float | Tensor = 1.0,
    alpha: float = 0.3,
    beta: float = 0.01,
    form: str = "exact",
) -> tuple[Tensor, Tensor, Tensor]:
    """Delayed LIF neurons trained by spike-timing-dependent backpropagation (STDB, 2005.01807 sections 2 and 3)::

        s[t] = 1 if u[t-1] > threshold else 0
        u[t] = leak * u[t-1] + current[t] - threshold * s[t]          (soft reset, without gradient)
        ds[t]/du[t-1] = alpha * exp(-beta * since[t]) / threshold     since[t]: steps from the last spike before t

    The surrogate depends on spike times alone, so backward needs one bit a neuron-step and no membrane or current.

    Args:
        current: `[T, ...]`, float32, bfloat16, float16 or float64.
        membrane: state before the first step, `current.shape[1:]`, of the state dtype; None: zeros.
        since: int32, `current.shape[1:]`: steps since the last spike at the first step; None: 999, as the official code
            starts (its last spike lies at step -1000).
        leak, threshold: a number, or a 0-d floating tensor on the device of the current, without gradient, whose value
            the kernel reads: nobody waits for a GPU, and a compiled or captured graph sees what is written there later.
            threshold must be above 0 (a tensor on a GPU is not checked).
        form: "exact", or "fp32_underflow": alpha * exp(-since)^beta as the official code rounds it in float32, which is
            0 from 104 steps on: neurons that are silent for longer, and every neuron's first spike, get no gradient.

    Returns:
        spikes, membrane, since: pass the last two to the next call to continue; gradients run through the membrane.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    checks.floating("stdb_lif", "current", current, 1, "[T, ...]")
    if membrane is not None:
        checks.like("stdb_lif", "membrane", membrane, current.shape[1:], state_dtype(current.dtype), current.device)
    if since is not None:
        checks.like("stdb_lif", "since", since, current.shape[1:], torch.int32, current.device)
    leak_tensor = threshold_tensor = None
    if isinstance(leak, Tensor):
        leak_tensor, leak = _scalar("leak", leak, current), 1.0
    if isinstance(threshold, Tensor):
        threshold_tensor, threshold = _scalar("threshold", threshold, current), 1.0
    numbers = [
        checks.number("stdb_lif", "leak", leak),
        checks.number("stdb_lif", "threshold", threshold, above=0.0),
        checks.number("stdb_lif", "alpha", alpha),
        checks.number("stdb_lif", "beta", beta, above=None if form == "exact" else 0.0),
        float(checks.choice("stdb_lif", "form", form, STDB_FORMS)),
    ]
    return _stdb_lif(current, membrane, since, leak_tensor, threshold_tensor, numbers)[:3]


def _scalar(name: str, value: Tensor, current: Tensor) -> Tensor:
    checks.floating("stdb_lif", name, value, 0, "of one value")
    checks.like("stdb_lif", name, value, (), value.dtype, current.device)
    if value.requires_grad:
        raise ValueError(f"stdb_lif: {name} must not require grad: the spike-time surrogate has no gradient for it; detach() it")
    return value.to(torch.float64)


def _keywords(leak_tensor: Tensor | None, threshold_tensor: Tensor | None, numbers: list[float]) -> dict:
    """The arguments of `SCHEMA` as those of the plain-torch twins, which read a tensor's value as the kernels do on the CPU."""
    leak, threshold, alpha, beta, form = numbers
    if leak_tensor is not None:
        leak = checks.number("stdb_lif", "leak", float(leak_tensor))
    if threshold_tensor is not None:
        threshold = checks.number("stdb_lif", "threshold", float(threshold_tensor), above=0.0)
    return dict(leak=leak, threshold=threshold, alpha=alpha, beta=beta, form=STDB_FORMS[int(form)])


def _outputs(current: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row = math.prod(current.shape[1:])
    return (
        torch.empty_like(current),
        options.step_like(current, state_dtype(current.dtype)),
        options.step_like(current, torch.int32),
        current.new_empty((current.shape[0], (row + 7) // 8), dtype=torch.uint8),
    )


def _kernel(current, membrane, since, leak, threshold, numbers):
    current = options.dense(current)
    spikes, membrane_out, since_out, bits = _outputs(current)
    if current.shape[0] == 0:
        membrane_out.zero_() if membrane is None else membrane_out.copy_(membrane)
        since_out.fill_(reference.neuron.NEVER) if since is None else since_out.copy_(since)
        return spikes, membrane_out, since_out, bits
    extension._C.neuron.stdb_forward(
        current, options.in_layout_of(membrane, current), options.in_layout_of(since, current), leak, threshold, numbers,
        spikes, membrane_out, since_out, bits,
    )  # fmt: skip
    return spikes, membrane_out, since_out, bits


def _fake(current, *rest):
    return _outputs(options.dense(current))


def _fallback(current, membrane, since, leak, threshold, numbers):
    out = _outputs(options.dense(current))
    twin = reference.stdb_lif(current, membrane, since, **_keywords(leak, threshold, numbers))
    for buffer, value in zip(out[:3], twin, strict=True):
        buffer.copy_(value)
    out[3].copy_(plain_pack(out[0], 1)[0])
    return out


def _setup_context(ctx, inputs, output):
    _, _, since, leak, threshold, ctx.numbers = inputs
    spikes, _, since_out, bits = output
    ctx.mark_non_differentiable(since_out, bits)
    # Nothing of size T*N is kept but the bits: shape, strides and dtype of the current stand for it.
    ctx.like = (spikes.shape, spikes.stride(), spikes.dtype, spikes.device)
    ctx.save_for_backward(since, bits, leak, threshold)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_spikes, grad_membrane, _since, _bits):
    if grad_spikes is None and grad_membrane is None:
        return (None,) * 6
    since, bits, leak, threshold = ctx.saved_tensors
    shape, strides, dtype, device = ctx.like
    if grad_spikes is None:
        grad_spikes = torch.zeros((), dtype=dtype, device=device).expand(shape)
    grad_current, grad_membrane_in = _stdb_lif_backward(
        grad_spikes, grad_membrane, since, bits, leak, threshold, ctx.numbers, list(strides), ctx.needs_input_grad[1]
    )
    return grad_current, grad_membrane_in if ctx.needs_input_grad[1] else None, *(None,) * 4


def _gradients(grad_spikes: Tensor, strides: list[int], wants_membrane: bool) -> tuple[Tensor, Tensor]:
    state = state_dtype(grad_spikes.dtype)
    out = torch.empty_strided(grad_spikes.shape, strides, dtype=grad_spikes.dtype, device=grad_spikes.device)
    return out, options.step_like(out, state) if wants_membrane else grad_spikes.new_empty(0, dtype=state)


def _backward_kernel(grad_spikes, grad_membrane, since, bits, leak, threshold, numbers, strides, wants_membrane):
    out, membrane_in = _gradients(grad_spikes, strides, wants_membrane)
    if out.shape[0] == 0:
        if wants_membrane:
            membrane_in.zero_() if grad_membrane is None else membrane_in.copy_(grad_membrane)
        return out, membrane_in
    extension._C.neuron.stdb_backward(
        out, options.in_layout_of(since, out), bits, leak, threshold, numbers,
        options.sequence_in_layout_of(grad_spikes, out), options.in_layout_of(grad_membrane, out),
        membrane_in if wants_membrane else None,
    )  # fmt: skip
    return out, membrane_in


def _backward_fake(grad_spikes, grad_membrane, since, bits, leak, threshold, numbers, strides, wants_membrane):
    return _gradients(grad_spikes, strides, wants_membrane)


def _backward_fallback(grad_spikes, grad_membrane, since, bits, leak, threshold, numbers, strides, wants_membrane):
    out, membrane_in = _gradients(grad_spikes, strides, wants_membrane)
    spikes = plain_unpack(bits[None], torch.empty_like(out), 1)
    gradient, first = reference.neuron.stdb_backward(
        spikes, since, grad_spikes, grad_membrane, **_keywords(leak, threshold, numbers)
    )
    out.copy_(gradient)
    return out, membrane_in.copy_(first) if wants_membrane else membrane_in


_stdb_lif_backward = register(
    "stdb_lif_backward(Tensor grad_spikes, Tensor? grad_membrane, Tensor? since, Tensor bits, "
    f"{SCHEMA}, int[] strides, bool wants_membrane) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    fallback=_backward_fallback,
)
_stdb_lif = register(
    "stdb_lif(Tensor current, Tensor? membrane, Tensor? since, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    fallback=_fallback,
    setup_context=_setup_context,
    backward=_backward,
)
