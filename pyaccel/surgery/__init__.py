"""Model in, new model out; the input stays untouched."""

from pyaccel.surgery.memory import with_noisy_memory, without_noisy_memory

__all__ = ["with_noisy_memory", "without_noisy_memory"]
