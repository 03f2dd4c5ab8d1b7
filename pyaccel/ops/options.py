"""A neuron's options on their way from keyword arguments to a schema and on to a kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pyaccel.ops import checks
from pyaccel.reference.neuron import RESETS, SURROGATES, state_dtype

# The part of every schema that describes a neuron: tensors where leak or threshold are tensors, then the numbers
# [leak, threshold, reset, detach_reset, delay, surrogate, scale, width] as one list: eight arguments would cost the
# dispatcher more than the rest of a small call.
SCHEMA = "Tensor? leak_tensor, Tensor? threshold_tensor, float[] neuron"


def neuron_arguments(
    op: str,
    current: Tensor,
    leak: float | Tensor,
    threshold: float | Tensor,
    reset: str,
    detach_reset: bool,
    delay: bool,
    surrogate: str,
    scale: float | None,
    width: float | None,
) -> tuple[Tensor | None, Tensor | None, list[float]]:
    """The arguments of `SCHEMA`, checked."""
    leak_tensor = threshold_tensor = None
    if isinstance(leak, Tensor):
        leak_tensor, leak = _parameter(op, "leak", leak, current), 1.0
    if isinstance(threshold, Tensor):
        threshold_tensor, threshold = _parameter(op, "threshold", threshold, current), 1.0
    given = (op, leak, threshold, reset, detach_reset, delay, surrogate, scale, width)
    if torch.compiler.is_compiling():  # a compiler traces the checks themselves and would warn about the cache
        return leak_tensor, threshold_tensor, list(_numbers(*given))
    try:
        return leak_tensor, threshold_tensor, list(_cached_numbers(*given))
    except TypeError:  # what cannot be a key is also wrong: say what
        return leak_tensor, threshold_tensor, list(_numbers(*given))


def _numbers(op, leak, threshold, reset, detach_reset, delay, surrogate, scale, width) -> tuple[float, ...]:
    kind = checks.choice(op, "surrogate", surrogate, SURROGATES)
    default_scale, default_width = SURROGATES[surrogate]
    return (
        checks.number(op, "leak", leak),
        checks.number(op, "threshold", threshold, above=0.0),
        float(checks.choice(op, "reset", reset, RESETS)),
        float(bool(detach_reset)),
        float(bool(delay)),
        float(kind),
        default_scale if scale is None else checks.number(op, "surrogate_scale", scale),
        default_width if width is None else checks.number(op, "surrogate_width", width, above=0.0),
    )


_cached_numbers = functools.lru_cache(maxsize=256, typed=True)(_numbers)


def _parameter(op: str, name: str, value: Tensor, current: Tensor) -> Tensor:
    if value.dim() == 0:
        shape = ()
    elif current.dim() >= 3:
        shape = (current.shape[2],)
    else:
        raise ValueError(f"{op}: a {name} of one value a channel needs current [T, B, C, ...], got {checks.shape_of(current)}")
    checks.like(op, name, value, shape, state_dtype(current.dtype), current.device)
    return value.contiguous()


def keywords(leak_tensor: Tensor | None, threshold_tensor: Tensor | None, neuron: list[float]) -> dict:
    """The arguments of `SCHEMA` as keyword arguments of the plain-torch twins."""
    leak, threshold, reset, detach_reset, delay, surrogate, scale, width = neuron
    return dict(
        leak=leak if leak_tensor is None else leak_tensor,
        threshold=threshold if threshold_tensor is None else threshold_tensor,
        reset=RESETS[int(reset)],
        detach_reset=bool(detach_reset),
        delay=bool(delay),
        surrogate=list(SURROGATES)[int(surrogate)],
        surrogate_scale=scale,
        surrogate_width=width,
    )


def per_channel(current: Tensor, always: bool, *parameters: Tensor | None) -> Sequence[Tensor | None]:
    """0-d parameters as `[C]` where another one is (or `always`): a kernel takes all of one kind."""
    if not (always or any(p is not None and p.dim() for p in parameters)):
        return parameters
    return [p.expand(current.shape[2]).contiguous() if p is not None and p.dim() == 0 else p for p in parameters]


def reduced(partial: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """Per-neuron partial gradients `[B, C, ...]` summed to the parameter's shape: 0-d or `[C]`."""
    if partial is None or parameter is None:
        return None
    if parameter.dim() == 0:
        return _total(partial)
    return partial.sum([d for d in range(partial.dim()) if d != 1])


def _total(partial: Tensor) -> Tensor:
    """The sum in an order that the shape alone decides: torch splits one long sum by the number of threads."""
    flat = partial.reshape(-1)
    while flat.numel() > 4096:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024).sum(1)
    return flat.sum()


def dense(tensor: Tensor) -> Tensor:
    """`tensor`, or a contiguous copy unless it already is contiguous or channels-last, time outermost."""
    if tensor.numel() == 0:  # counts as contiguous whatever its strides are, which kernels compare
        return tensor.new_empty(tensor.shape)
    if tensor.is_contiguous():
        return tensor
    if tensor.dim() == 5 and tensor.transpose(2, 3).transpose(3, 4).is_contiguous():
        return tensor
    return tensor.contiguous()


def dense_images(images: Tensor) -> Tensor:
    """`images`, or a contiguous copy unless they already are contiguous or (`[B, C, H, W]`) channels-last."""
    if images.is_contiguous() or (images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)):
        return images
    return images.contiguous()


def step_like(sequence: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised state of one step, in the memory layout of a dense `sequence` ([T, ...], T may be 0)."""
    # empty_strided: new_empty and torch.empty cost a small call ten microseconds more
    return torch.empty_strided(sequence.shape[1:], sequence.stride()[1:], dtype=dtype, device=sequence.device)


def in_layout_of(step: Tensor | None, sequence: Tensor) -> Tensor | None:
    """State or its gradient, brought into the memory layout of one step of `sequence`."""
    if step is None or step.stride() == sequence.stride()[1:]:
        return step
    out = step_like(sequence, step.dtype)
    return out.copy_(step)


def sequence_in_layout_of(tensor: Tensor | None, sequence: Tensor) -> Tensor | None:
    """An upstream gradient in the memory layout (and dtype) of `sequence`."""
    if tensor is None or (tensor.stride() == sequence.stride() and tensor.dtype == sequence.dtype):
        return tensor
    return torch.empty_like(sequence).copy_(tensor)
