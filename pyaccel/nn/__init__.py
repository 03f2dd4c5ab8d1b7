"""Modules over the operators, with parameters and explicit state."""

from pyaccel.nn.analog import AnalogConv2d, AnalogLinear
from pyaccel.nn.bntt import BNTTLIF, convert_sync_bntt
from pyaccel.nn.factorized import FactorizedConv2d, grown_spare, hoyer, kept_by_energy, orthogonality
from pyaccel.nn.memory import NoisyMemory, StoredOutput, set_memory_pass, without_failures
from pyaccel.nn.neuron import IF, LIF, STDBLIF, PoissonEncoder
from pyaccel.nn.prototypes import PrototypeMemory, choose_prototypes, self_entropy
from pyaccel.nn.quant import QuantConv2d, QuantLinear, load_packed_state, packed_state
from pyaccel.nn.spike_layers import SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from pyaccel.nn.task_norm import TaskBatchNorm2d
from pyaccel.nn.time import every_step

__all__ = [
    "AnalogConv2d",
    "AnalogLinear",
    "BNTTLIF",
    "FactorizedConv2d",
    "IF",
    "LIF",
    "NoisyMemory",
    "PoissonEncoder",
    "PrototypeMemory",
    "QuantConv2d",
    "QuantLinear",
    "STDBLIF",
    "SpikeAvgPool2d",
    "SpikeConv2d",
    "SpikeLinear",
    "StoredOutput",
    "TaskBatchNorm2d",
    "choose_prototypes",
    "convert_sync_bntt",
    "every_step",
    "grown_spare",
    "hoyer",
    "kept_by_energy",
    "load_packed_state",
    "orthogonality",
    "packed_state",
    "set_memory_pass",
    "self_entropy",
    "without_failures",
]
