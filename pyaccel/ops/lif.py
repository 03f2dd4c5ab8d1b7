"""`lif`: a leaky integrate-and-fire neuron unrolled over time, one kernel forward and one backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.ops import checks, options
from pyaccel.ops.library import register
from pyaccel.ops.packing import plain_pack
from pyaccel.reference.neuron import state_dtype

# Backward recomputes the membrane on chip from the current alone up to this many steps; beyond, forward also keeps the
# membrane every CHECKPOINT_EVERY steps, so that memory on chip stays bounded at any T.
LONGEST_WITHOUT = {"cpu": 128, "cuda": 32}
CHECKPOINT_EVERY = 32


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
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire neurons over T steps.

    Prompt neuron (`delay=False`; 2010.01729 and most libraries)::

        u[t] = leak * v[t-1] + current[t]
        s[t] = 1 if u[t] > threshold else 0
        v[t] = u[t] - threshold * s[t]   (reset="soft")     u[t] * (1 - s[t])   ("hard")     u[t]   ("none")

    Delayed neuron (`delay=True`; 2005.01807): it fires on the last step's membrane, and the reset is not leaked::

        s[t] = 1 if u[t-1] > threshold else 0
        u[t] = leak * u[t-1] + current[t] - threshold * s[t]     (hard: leak * u[t-1] * (1 - s[t]) + current[t])

    Gradients run through the whole sequence. The spike's derivative is a surrogate phi(a)/threshold, a = u/threshold - 1:
    `triangle` scale*max(0, 1-|a|/width) (default 0.3, 1), `rectangle` scale/width where |a| < width/2 (1, 1), `atan`
    scale*(width/2)/(1+(pi/2*width*a)^2) (1, 2), `sigmoid` scale*width*sig(width*a)*(1-sig(width*a)) (1, 4),
    `fast_sigmoid` scale/(1+width*|a|)^2 (1, 25). With `detach_reset` no gradient runs through the reset.

    Args:
        current: `[T, ...]`, float32, bfloat16, float16 or float64; contiguous or channels-last. T = 0 is valid.
        membrane: state before the first step, shape `current.shape[1:]`, float32 (float64 for float64); None: zeros.
        leak, threshold: a number, or a tensor of the state dtype, 0-d or `[C]` (dimension 1 of the state), with gradient.
            threshold must be above 0.
        packed: return the spikes as bits, uint8 `[T, ceil(N / 8)]` (see `pack_spikes`), for inference: a packed tensor
            carries no gradient.

    Returns:
        spikes `[T, ...]` in the dtype and layout of `current`, and the membrane after the last step (pass it to the next
        call to continue: gradients run through it). In float32 both are bit-identical on every device and to
        `pyaccel.reference.lif`.

    Raises:
        TypeError, ValueError: what was expected and what came.
    """
    checks.floating("lif", "current", current, 1, "[T, ...]")
    if membrane is not None:
        checks.like("lif", "membrane", membrane, current.shape[1:], state_dtype(current.dtype), current.device)
    neuron = options.neuron_arguments(
        "lif", current, leak, threshold, reset, detach_reset, delay, surrogate, surrogate_scale, surrogate_width
    )
    if packed:
        return _packed(current, membrane, neuron)
    every = 0
    if current.size(0) > LONGEST_WITHOUT["cpu" if current.is_cpu else "cuda"] and torch.is_grad_enabled():
        tracked = (current, membrane, neuron[0], neuron[1])
        every = CHECKPOINT_EVERY if any(t is not None and t.requires_grad for t in tracked) else 0
    spikes, membrane, _ = _lif(current, membrane, *neuron, every)
    return spikes, membrane


def _packed(current: Tensor, membrane: Tensor | None, neuron: tuple) -> tuple[Tensor, Tensor]:
    tracked = (current, membrane, neuron[0], neuron[1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tracked):
        raise ValueError("lif: packed spikes carry no gradient; call it under torch.no_grad(), or use packed=False and spike_conv2d")
    return _lif_packed(current, membrane, *neuron)


def _outputs(current: Tensor, every: int) -> tuple[Tensor, Tensor, Tensor]:
    state = state_dtype(current.dtype)
    kept = (current.shape[0] - 1) // every if every and current.shape[0] else 0
    per_step = current[0].numel() if kept else 0
    checkpoints = torch.empty_strided((kept, per_step), (per_step if kept else 1, 1), dtype=state, device=current.device)
    return torch.empty_like(current), options.step_like(current, state), checkpoints


def _kernel(current, membrane, leak_tensor, threshold_tensor, neuron, every):
    current = options.dense(current)
    membrane = options.in_layout_of(membrane, current)
    spikes, membrane_out, checkpoints = _outputs(current, every)
    if current.numel() == 0:
        membrane_out.zero_() if membrane is None else membrane_out.copy_(membrane)
    else:
        parameters = options.per_channel(current, False, leak_tensor, threshold_tensor)
        extension._C.neuron.lif_forward(
            current, membrane, *parameters, neuron, every, False, spikes, membrane_out, checkpoints
        )
    return spikes, membrane_out, checkpoints


def _fake(current, membrane, leak_tensor, threshold_tensor, neuron, every):
    return _outputs(options.dense(current), every)


def _fallback(current, membrane, leak_tensor, threshold_tensor, neuron, every):
    keywords = options.keywords(leak_tensor, threshold_tensor, neuron)
    twin = reference.lif(current, membrane, **keywords)
    spikes, state, checkpoints = _outputs(options.dense(current), every)
    return spikes.copy_(twin[0]), state.copy_(twin[1]), checkpoints


def _setup_context(ctx, inputs, output):
    current, membrane, leak_tensor, threshold_tensor, *ctx.options = inputs
    ctx.save_for_backward(current, membrane, leak_tensor, threshold_tensor, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_spikes, grad_membrane, _):
    current, membrane, leak_tensor, threshold_tensor, checkpoints = ctx.saved_tensors
    nothing = (None,) * 6
    if grad_spikes is None and grad_membrane is None:
        return nothing
    grads = _lif_backward(
        grad_spikes, grad_membrane, current, membrane, checkpoints, leak_tensor, threshold_tensor, *ctx.options,
        [bool(n) for n in ctx.needs_input_grad[:4]],
    )  # fmt: skip
    wanted = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)]
    return (*wanted, *nothing[4:])


def _gradients(current: Tensor, membrane, leak_tensor, threshold_tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    state = state_dtype(current.dtype)
    return (
        torch.empty_like(current),
        options.step_like(current, state) if wanted[1] else current.new_empty(0, dtype=state),
        torch.empty_like(leak_tensor) if wanted[2] else current.new_empty(0, dtype=state),
        torch.empty_like(threshold_tensor) if wanted[3] else current.new_empty(0, dtype=state),
    )


def _backward_kernel(
    grad_spikes, grad_membrane, current, membrane, checkpoints, leak_tensor, threshold_tensor, neuron, every, wanted
):
    current = options.dense(current)
    grad_spikes = options.sequence_in_layout_of(grad_spikes, current)
    grad_membrane = options.in_layout_of(grad_membrane, current)
    membrane = options.in_layout_of(membrane, current)
    out, membrane_in, leak, threshold = _gradients(current, membrane, leak_tensor, threshold_tensor, wanted)
    if current.numel() == 0:
        if wanted[1]:
            membrane_in.zero_() if grad_membrane is None else membrane_in.copy_(grad_membrane)
        return out, membrane_in, leak.zero_(), threshold.zero_()
    partial = [options.step_like(current, state_dtype(current.dtype)) if w else None for w in wanted[2:]]
    extension._C.neuron.lif_backward(
        current, membrane, *options.per_channel(current, False, leak_tensor, threshold_tensor), neuron, every,
        checkpoints if every else None,
        grad_spikes, grad_membrane, out, membrane_in if wanted[1] else None, *partial,
    )  # fmt: skip
    leak = options.reduced(partial[0], leak_tensor) if wanted[2] else leak
    threshold = options.reduced(partial[1], threshold_tensor) if wanted[3] else threshold
    return out, membrane_in, leak, threshold


def _backward_fake(grad_spikes, grad_membrane, current, membrane, checkpoints, leak_tensor, threshold_tensor, neuron, every, wanted):
    return _gradients(options.dense(current), membrane, leak_tensor, threshold_tensor, wanted)


def _backward_fallback(
    grad_spikes, grad_membrane, current, membrane, checkpoints, leak_tensor, threshold_tensor, neuron, every, wanted
):
    given = (current, membrane, leak_tensor, threshold_tensor)
    out = _gradients(options.dense(current), *given[1:], wanted)
    with torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_() for t in given]
        twin = reference.lif(leaves[0], leaves[1], **options.keywords(leaves[2], leaves[3], neuron))
        pairs = [(o, g) for o, g in zip(twin, (grad_spikes, grad_membrane), strict=True) if g is not None and o.requires_grad]
        asked = [leaf for leaf, w in zip(leaves, wanted, strict=True) if w]
        found = iter(torch.autograd.grad([o for o, _ in pairs], asked, [g for _, g in pairs], allow_unused=True))
    for buffer, w in zip(out, wanted, strict=True):
        if w:
            gradient = next(found)
            buffer.zero_() if gradient is None else buffer.copy_(gradient)
    return out


def _packed_outputs(current: Tensor) -> tuple[Tensor, Tensor]:
    row = math.prod(current.shape[1:])
    bits = current.new_empty((current.shape[0], (row + 7) // 8), dtype=torch.uint8)
    return bits, options.step_like(current, state_dtype(current.dtype))


def _packed_kernel(current, membrane, leak_tensor, threshold_tensor, neuron):
    current = options.dense(current.contiguous())  # bits are counted in logical order
    membrane = options.in_layout_of(membrane, current)
    bits, membrane_out = _packed_outputs(current)
    if current.shape[0] == 0:
        membrane_out.zero_() if membrane is None else membrane_out.copy_(membrane)
    else:
        parameters = options.per_channel(current, False, leak_tensor, threshold_tensor)
        extension._C.neuron.lif_forward(current, membrane, *parameters, neuron, 0, True, bits, membrane_out, None)
    return bits, membrane_out


def _packed_fake(current, *rest):
    return _packed_outputs(current.contiguous())


def _packed_fallback(current, membrane, leak_tensor, threshold_tensor, neuron):
    spikes, membrane_out = reference.lif(current, membrane, **options.keywords(leak_tensor, threshold_tensor, neuron))
    bits, state = _packed_outputs(current.contiguous())
    return bits.copy_(plain_pack(spikes.contiguous(), 1)[0]), state.copy_(membrane_out)


_lif_packed = register(
    f"lif_packed(Tensor current, Tensor? membrane, {options.SCHEMA}) -> (Tensor, Tensor)",
    kernel=_packed_kernel,
    fake=_packed_fake,
    fallback=_packed_fallback,
)
_lif_backward = register(
    "lif_backward(Tensor? grad_spikes, Tensor? grad_membrane, Tensor current, Tensor? membrane, Tensor checkpoints, "
    f"{options.SCHEMA}, int checkpoint_every, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    fallback=_backward_fallback,
)
_lif = register(
    f"lif(Tensor current, Tensor? membrane, {options.SCHEMA}, int checkpoint_every) -> (Tensor, Tensor, Tensor)",
    kernel=_kernel,
    fake=_fake,
    fallback=_fallback,
    setup_context=_setup_context,
    backward=_backward,
)
