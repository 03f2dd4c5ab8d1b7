"""A batch on another device."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(batch: T, device: str | torch.device) -> T:
    """The batch with every tensor on `device`: named tuples, tuples, lists, dicts, dataclasses, nested as they like."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return type(batch)((key, to_device(value, device)) for key, value in batch.items())
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch):
        return dataclasses.replace(batch, **{field.name: to_device(getattr(batch, field.name), device)
                                             for field in dataclasses.fields(batch)})
    return batch
