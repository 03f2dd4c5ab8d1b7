"""Modules over the operators, with parameters and explicit state."""

from pyaccel.nn.analog import AnalogConv2d, AnalogLinear
from pyaccel.nn.neuron import BNTTLIF, IF, LIF, STDBLIF, PoissonEncoder
from pyaccel.nn.spike_layers import SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from pyaccel.nn.time import every_step

__all__ = [
    "AnalogConv2d",
    "AnalogLinear",
    "BNTTLIF",
    "IF",
    "LIF",
    "PoissonEncoder",
    "STDBLIF",
    "SpikeAvgPool2d",
    "SpikeConv2d",
    "SpikeLinear",
    "every_step",
]
