"""Modules over the operators, with parameters and explicit state."""

from pyaccel.nn.neuron import BNTTLIF, IF, LIF, STDBLIF, PoissonEncoder
from pyaccel.nn.quant import QuantConv2d, QuantLinear, load_packed_state, packed_state
from pyaccel.nn.spike_layers import SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from pyaccel.nn.time import every_step

__all__ = [
    "BNTTLIF",
    "IF",
    "LIF",
    "PoissonEncoder",
    "QuantConv2d",
    "QuantLinear",
    "STDBLIF",
    "SpikeAvgPool2d",
    "SpikeConv2d",
    "SpikeLinear",
    "every_step",
    "load_packed_state",
    "packed_state",
]
