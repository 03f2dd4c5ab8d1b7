"""Modules over the operators, with parameters and explicit state."""

from pyaccel.nn.neuron import BNTTLIF, IF, LIF, PoissonEncoder
from pyaccel.nn.time import every_step

__all__ = ["BNTTLIF", "IF", "LIF", "PoissonEncoder", "every_step"]
