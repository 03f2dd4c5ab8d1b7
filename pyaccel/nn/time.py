"""Layers without memory, applied to all steps at once: `[T, B, ...]` is one batch of T*B samples to them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def every_step(layer: Callable[[Tensor], Tensor], sequence: Tensor) -> Tensor:
    """`layer` applied to every step of `[T, B, ...]` in one call (layer-major execution; exact, as it has no state)."""
    return layer(sequence.flatten(0, 1)).unflatten(0, sequence.shape[:2])
