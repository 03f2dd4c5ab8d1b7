"""A batch on another device, or in parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(batch: T, device: str | torch.device) -> T:
    """The batch with every tensor on `device`: named tuples, tuples, lists, dicts, dataclasses, nested as they like."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(batch: T, change: Callable[[Tensor], Tensor]) -> T:
    """The batch with every tensor changed; the same containers as in `to_device`."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return type(batch)((key, map_tensors(value, change)) for key, value in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, change) for value in batch)
    if dataclasses.is_dataclass(batch):
        return dataclasses.replace(batch, **{field.name: map_tensors(getattr(batch, field.name), change)
                                             for field in dataclasses.fields(batch)})
    return batch


def cut(batch: T, parts: int) -> list[T]:
    """The batch in at most `parts` pieces along the first dimension of its tensors: dicts, named and plain tuples, lists.

    ValueError for a batch without a tensor.
    """
    if isinstance(batch, Tensor):
        return list(batch.chunk(parts))
    fields = list(batch.values()) if isinstance(batch, dict) else list(batch)
    pieces = [cut(field, parts) if isinstance(field, (Tensor, dict, tuple, list)) else None for field in fields]
    count = min((len(piece) for piece in pieces if piece), default=0)
    if count == 0:
        raise ValueError(f"a batch of {type(batch).__name__} without a tensor cannot be cut into parts")
    found = []
    for i in range(count):
        values = [field if piece is None else piece[i] for field, piece in zip(fields, pieces, strict=True)]
        if isinstance(batch, dict):
            found.append(type(batch)(zip(batch, values, strict=True)))
        else:
            found.append(type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values))
    return found
