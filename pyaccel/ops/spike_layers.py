"""`spike_conv2d`, `spike_linear`, `spike_avg_pool2d`: torch's layers, but what they keep of their spikes for backward is bits.

A convolution keeps its input for the gradient of its weight: 4 bytes a spike in float32. Spikes are 0 and 1 (or a few
values more), so one to four bits hold them; backward unpacks them again, a few images at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from pyaccel.ops import checks, options, packing

UNPACKED_BYTES = 32 << 20  # backward unpacks this much at a time


def spike_conv2d(
    spikes: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    kind: str = "binary",
) -> Tensor:
    """2-D convolution of spikes, as `torch.nn.functional.conv2d`; backward keeps `kind`'s bits in place of the input.

    Args:
        spikes: `[..., C, H, W]` with any leading dimensions (`[T, B, C, H, W]`), contiguous or channels-last.
        weight, bias, stride, padding, dilation, groups: as torch's.
        kind: what values the spikes have: "binary" (0, 1; 1 bit), "signed" (-1, 0, 1; 2 bits), "pooled" (2x2 means of
            binary spikes; 3 bits), "pooled_signed" (4 bits).

    Raises:
        ValueError: values that `kind` cannot store (checked on the CPU; a GPU is not waited for), wrong shapes.
    """
    checks.floating("spike_conv2d", "spikes", spikes, 4, "[..., C, H, W]")
    checks.floating("spike_conv2d", "weight", weight, 4, "[O, C/groups, kH, kW]")
    checks.choice("spike_conv2d", "kind", kind, packing.KINDS)
    if weight.dim() != 4 or spikes.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"spike_conv2d: weight must be [O, {spikes.shape[-3]}/{groups}, kH, kW] for spikes {checks.shape_of(spikes)}, "
            f"got {checks.shape_of(weight)}"
        )
    if isinstance(padding, str):
        raise TypeError(f"spike_conv2d: padding must be an integer or a pair of integers, got {padding!r}")
    lead = spikes.shape[:-3]
    spikes, weight, bias = _autocast(spikes.flatten(0, -4) if spikes.dim() != 4 else spikes, weight, bias)
    out = _conv2d(spikes, weight, bias, _pair(stride), _pair(padding), _pair(dilation), groups, kind, _keeps(weight))
    return out.unflatten(0, lead) if len(lead) != 1 else out


def spike_linear(spikes: Tensor, weight: Tensor, bias: Tensor | None = None, *, kind: str = "binary") -> Tensor:
    """Linear map of spikes `[..., in]`, as `torch.nn.functional.linear`; backward keeps `kind`'s bits (see `spike_conv2d`)."""
    checks.floating("spike_linear", "spikes", spikes, 2, "[..., in]")
    checks.floating("spike_linear", "weight", weight, 2, "[out, in]")
    checks.choice("spike_linear", "kind", kind, packing.KINDS)
    if weight.dim() != 2 or spikes.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"spike_linear: weight must be [out, {spikes.shape[-1]}] for spikes {checks.shape_of(spikes)}, "
            f"got {checks.shape_of(weight)}"
        )
    return _linear(*_autocast(spikes, weight, bias), kind, _keeps(weight))


def spike_avg_pool2d(spikes: Tensor, kernel_size: int | tuple[int, int]) -> Tensor:
    """Average pooling of `[..., H, W]` with stride = kernel; unlike torch's it keeps nothing of its input for backward."""
    checks.floating("spike_avg_pool2d", "spikes", spikes, 3, "[..., C, H, W]")
    return _avg_pool2d(spikes, _pair(kernel_size))


def _keeps(weight: Tensor) -> bool:
    """Whether backward will want the spikes."""
    return torch.is_grad_enabled() and weight.requires_grad


def _autocast(spikes: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does for torch's own layers."""
    if spikes.is_meta or spikes.dtype == torch.float64 or not torch.is_autocast_enabled(spikes.device.type):
        return spikes, weight, bias
    dtype = torch.get_autocast_dtype(spikes.device.type)
    return spikes.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spikes, weight, bias, stride, padding, dilation, groups, kind, keep):
        spikes = options.dense_images(spikes)
        ctx.geometry, ctx.kind, ctx.layout = (stride, padding, dilation, groups), kind, packing.layout_of(spikes)
        packed = packing.pack("spike_conv2d", spikes, kind) if keep else None
        ctx.save_for_backward(packed, weight)
        return torch.nn.functional.conv2d(spikes, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        packed, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        shape, strides, dtype = ctx.layout
        needs = ctx.needs_input_grad
        grad_spikes = grad_weight = grad_bias = None
        if needs[0]:
            grad_spikes = torch.nn.grad.conv2d_input(shape, weight, grad, stride, padding, dilation, groups)
        if needs[1]:
            for images, part in _images(packed, ctx.kind, shape, strides, dtype):
                piece = torch.nn.grad.conv2d_weight(images, weight.shape, grad[part], stride, padding, dilation, groups)
                grad_weight = piece if grad_weight is None else grad_weight + piece
            if grad_weight is None:
                grad_weight = torch.zeros_like(weight)
        if needs[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_spikes, grad_weight, grad_bias, None, None, None, None, None, None


def _images(packed: Tensor, kind: str, shape, strides, dtype):
    """The unpacked spikes, a few images at a time, so that the whole never lies in memory unpacked."""
    total = shape[0]
    row_bytes = max(1, torch.empty((), dtype=dtype).element_size() * (strides[0] if total > 1 else 1))
    step = max(1, UNPACKED_BYTES // row_bytes)
    for first in range(0, total, step):
        part = slice(first, min(total, first + step))
        rows = packed[:, part].contiguous()
        yield packing.unpack(rows, kind, ((part.stop - first, *shape[1:]), strides, dtype)), part


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spikes, weight, bias, kind, keep):
        rows = spikes.flatten(0, -2).contiguous()
        ctx.kind, ctx.layout, ctx.shape = kind, packing.layout_of(rows), spikes.shape
        packed = packing.pack("spike_linear", rows, kind) if keep else None
        ctx.save_for_backward(packed, weight)
        return torch.nn.functional.linear(spikes, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        packed, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        needs = ctx.needs_input_grad
        return (
            (grad @ weight).reshape(ctx.shape) if needs[0] else None,
            rows.t() @ packing.unpack(packed, ctx.kind, ctx.layout) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
            None,
            None,
        )


class _AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spikes, kernel):
        ctx.kernel, ctx.shape = kernel, spikes.shape
        images = spikes.flatten(0, -4) if spikes.dim() > 4 else spikes
        out = torch.nn.functional.avg_pool2d(images, kernel)
        return out.reshape(*spikes.shape[:-2], *out.shape[-2:]) if spikes.dim() > 4 else out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (kh, kw), shape = ctx.kernel, ctx.shape
        grad = grad / (kh * kw)
        images = grad.flatten(0, -4) if grad.dim() > 4 else grad
        powers = kh & (kh - 1) == 0 and kw & (kw - 1) == 0  # of two: interpolate finds its pixels by exact inverses
        if powers and images.dim() == 4 and options.dense_images(images) is images and not images.is_contiguous():
            # Channels-last stays channels-last, at a quarter of the time of repeating and bringing it into order again.
            spread = torch.nn.functional.interpolate(images, scale_factor=(float(kh), float(kw)), mode="nearest")
            spread = spread.unflatten(0, grad.shape[:-3]) if grad.dim() > 4 else spread
        else:
            spread = grad.repeat_interleave(kh, -2).repeat_interleave(kw, -1)
        # Rows and columns that no window covered have no gradient.
        return torch.nn.functional.pad(spread, (0, shape[-1] - spread.shape[-1], 0, shape[-2] - spread.shape[-2])), None


_conv2d, _linear, _avg_pool2d = _Conv2d.apply, _Linear.apply, _AvgPool2d.apply
