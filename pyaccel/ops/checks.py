"""Checks of the public operators. A message says what was expected, what came and, where it helps, what to do.

None of them reads a value of a tensor: that would synchronise a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(value: object) -> str:
    """`[4, 8]`, or `a 0-d tensor`, or the type of what is no tensor."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"[{', '.join(map(str, value.shape))}]" if value.dim() else "a 0-d tensor"


def floating(op: str, name: str, tensor: object, minimum: int, wanted: str) -> None:
    """`tensor` is a floating tensor with at least `minimum` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor {wanted}, got {shape_of(tensor)}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {tensor.layout}; convert it with .to_dense()")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}; convert it with .float()"
        )
    if tensor.dim() < minimum:
        raise ValueError(f"{op}: {name} must be {wanted}, got {shape_of(tensor)}")


def like(op: str, name: str, tensor: object, shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
    """`tensor` has exactly this shape, dtype and device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {shape_of(tensor)}")
    shape = tuple(shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {shape_of(tensor)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}; convert it with .to({dtype})")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other tensors on {device}; move it with .to({str(device)!r})")


def number(op: str, name: str, value: object, *, above: float | None = None) -> float:
    """A finite float, greater than `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not math.isfinite(number) or (above is not None and number <= above):
        bound = "" if above is None else f" above {above:g}"
        raise ValueError(f"{op}: {name} must be a finite number{bound}, got {value}")
    return number


def choice(op: str, name: str, value: object, options: Iterable[str]) -> int:
    """The position of `value` among `options`."""
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(options)}, got {value!r}")
    return options.index(value)


def whole(op: str, name: str, value: object, low: int, high: int) -> int:
    """An integer in low..high (inclusive)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in {low}..{high}, got {value}")
    return value
