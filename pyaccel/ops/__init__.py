"""Differentiable torch operators over the kernels. Functions take and return their state; time comes first."""

from pyaccel.ops.bntt import bntt_lif, bntt_statistics
from pyaccel.ops.encode import poisson_encode
from pyaccel.ops.lif import lif
from pyaccel.ops.packing import pack_spikes, unpack_spikes
from pyaccel.ops.spike_layers import spike_avg_pool2d, spike_conv2d, spike_linear
from pyaccel.ops.sram import flip_bits, flip_bits_, sram_noise
from pyaccel.ops.stdb import stdb_lif

from pyaccel.ops import flops as _flops  # isort: skip  # noqa: F401  (after the operators that it describes)

__all__ = [
    "bntt_lif",
    "bntt_statistics",
    "flip_bits",
    "flip_bits_",
    "lif",
    "pack_spikes",
    "poisson_encode",
    "spike_avg_pool2d",
    "spike_conv2d",
    "spike_linear",
    "sram_noise",
    "stdb_lif",
    "unpack_spikes",
]
