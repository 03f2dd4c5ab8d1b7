"""Differentiable torch operators over the kernels. Functions take and return their state; time comes first."""

from pyaccel.ops.bntt import bntt_lif, bntt_statistics
from pyaccel.ops.encode import poisson_encode
from pyaccel.ops.lif import lif
from pyaccel.ops.packing import pack_spikes, unpack_spikes
from pyaccel.ops.qmac import (
    dequantize_sums,
    pack_codes,
    quantize_codes,
    quantized_conv2d,
    quantized_linear,
    unpack_codes,
)
from pyaccel.ops.quantizers import fake_quantize, quantize_affine, quantize_range, quantize_symmetric, weight_grid
from pyaccel.ops.spike_layers import spike_avg_pool2d, spike_conv2d, spike_linear
from pyaccel.ops.stdb import stdb_lif

from pyaccel.ops import flops as _flops  # isort: skip  # noqa: F401  (after the operators that it describes)

__all__ = [
    "bntt_lif",
    "bntt_statistics",
    "dequantize_sums",
    "fake_quantize",
    "lif",
    "pack_codes",
    "pack_spikes",
    "poisson_encode",
    "quantize_affine",
    "quantize_codes",
    "quantize_range",
    "quantize_symmetric",
    "quantized_conv2d",
    "quantized_linear",
    "spike_avg_pool2d",
    "spike_conv2d",
    "spike_linear",
    "stdb_lif",
    "unpack_codes",
    "unpack_spikes",
    "weight_grid",
]
