"""Differentiable torch operators over the kernels. Functions take and return their state; time comes first."""

from pyaccel.ops.bntt import bntt_lif, bntt_statistics
from pyaccel.ops.crossbar_matmul import adc_range, crossbar_matmul
from pyaccel.ops.crossbar_matrix import crossbar_matrix
from pyaccel.ops.encode import poisson_encode
from pyaccel.ops.lif import lif
from pyaccel.ops.packing import pack_spikes, unpack_spikes
from pyaccel.ops.spike_layers import spike_avg_pool2d, spike_conv2d, spike_linear
from pyaccel.ops.stdb import stdb_lif

from pyaccel.ops import flops as _flops  # isort: skip  # noqa: F401  (after the operators that it describes)

__all__ = [
    "adc_range",
    "bntt_lif",
    "bntt_statistics",
    "crossbar_matmul",
    "crossbar_matrix",
    "lif",
    "pack_spikes",
    "poisson_encode",
    "spike_avg_pool2d",
    "spike_conv2d",
    "spike_linear",
    "stdb_lif",
    "unpack_spikes",
]
