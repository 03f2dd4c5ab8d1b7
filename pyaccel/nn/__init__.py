"""Modules over the operators, with parameters and explicit state."""

from pyaccel.nn.neuron import BNTTLIF, IF, LIF, PoissonEncoder
from pyaccel.nn.quant import QuantConv2d, QuantLinear, load_packed_state, packed_state
from pyaccel.nn.time import every_step

__all__ = [
    "BNTTLIF",
    "IF",
    "LIF",
    "PoissonEncoder",
    "QuantConv2d",
    "QuantLinear",
    "every_step",
    "load_packed_state",
    "packed_state",
]
