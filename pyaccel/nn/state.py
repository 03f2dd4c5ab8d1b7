"""State that a module carries from one call to the next, when asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from pyaccel.ops.running import recomputing


class Stateful(nn.Module):
    """A module with `stateful=True` carries its membrane over to the next call, until `reset_state()`; else nothing.

    Copies and pickles carry the state as well, without its history: torch copies no tensor that has one.
    """

    def __init__(self, stateful: bool):
        super().__init__()
        self.stateful = stateful
        self.membrane: Tensor | None = None

    def reset_state(self) -> None:
        """Forget the state kept by a stateful module."""
        self.membrane = None

    def carry(self, first_step: int, membrane: Tensor) -> None:
        """The next call starts from this state, at this time step of its sequence."""
        self.membrane = membrane

    def carried_state(self) -> tuple[Tensor, ...]:
        """What `carry` takes back, after a call."""
        return (self.membrane,)

    def detach_state(self) -> None:
        """Keep the state, cut its history (truncated backpropagation through time)."""
        self.membrane = None if self.membrane is None else self.membrane.detach()

    def _carried(self) -> Tensor | None:
        """What a call starts from."""
        if self.stateful:
            refuse_recomputation(self, "its state has moved on; pass the state yourself with pyaccel.ops")
        return self.membrane

    def _keep(self, membrane: Tensor) -> None:
        self.membrane = membrane if self.stateful else None

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if self.membrane is not None:
            state["membrane"] = self.membrane.detach()
        return state


_repeating: ContextVar[bool] = ContextVar("repeating", default=False)


@contextmanager
def repeating() -> Iterator[None]:
    """Inside, a checkpointed block may be repeated: the caller has put states and counters back to what they were."""
    token = _repeating.set(True)
    try:
        yield
    finally:
        _repeating.reset(token)


def refuse_recomputation(module: nn.Module, why: str) -> None:
    """An error where activation checkpointing repeats what cannot be repeated: gradients would be wrong, in silence."""
    if not torch.compiler.is_compiling() and recomputing() and not _repeating.get():
        raise RuntimeError(f"{type(module).__name__}: a checkpointed block cannot repeat this layer: {why}")
