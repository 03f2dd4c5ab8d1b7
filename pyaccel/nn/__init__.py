"""Modules over the operators, with parameters and explicit state."""

from pyaccel.nn.memory import NoisyMemory, StoredOutput, without_failures
from pyaccel.nn.neuron import BNTTLIF, IF, LIF, PoissonEncoder
from pyaccel.nn.time import every_step

__all__ = [
    "BNTTLIF",
    "IF",
    "LIF",
    "NoisyMemory",
    "PoissonEncoder",
    "StoredOutput",
    "every_step",
    "without_failures",
]
