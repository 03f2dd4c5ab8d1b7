"""Differentiable torch operators over the kernels. Functions take and return their state; time comes first."""

from pyaccel.ops.bntt import bntt_lif, bntt_statistics
from pyaccel.ops.crossbar_matmul import adc_range, crossbar_matmul
from pyaccel.ops.crossbar_matrix import crossbar_matrix
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
from pyaccel.ops.sram import flip_bits, flip_bits_, sram_noise
from pyaccel.ops.stdb import stdb_lif

from pyaccel.ops import flops as _flops  # isort: skip  # noqa: F401  (after the operators that it describes)

__all__ = [
    "adc_range",
    "bntt_lif",
    "bntt_statistics",
    "crossbar_matmul",
    "crossbar_matrix",
    "dequantize_sums",
    "fake_quantize",
    "flip_bits",
    "flip_bits_",
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
    "sram_noise",
    "stdb_lif",
    "unpack_codes",
    "unpack_spikes",
    "weight_grid",
]
