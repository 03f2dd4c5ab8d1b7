"""Modules over the operators, with parameters and explicit state."""

from pyaccel.nn.memory import NoisyMemory, StoredOutput, without_failures
from pyaccel.nn.neuron import BNTTLIF, IF, LIF, STDBLIF, PoissonEncoder
from pyaccel.nn.spike_layers import SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from pyaccel.nn.time import every_step

__all__ = [
    "BNTTLIF",
    "IF",
    "LIF",
    "NoisyMemory",
    "PoissonEncoder",
    "STDBLIF",
    "SpikeAvgPool2d",
    "SpikeConv2d",
    "SpikeLinear",
    "StoredOutput",
    "every_step",
    "without_failures",
]
