"""Plain-torch twins of every kernel, written for reading: same names and arguments as in `pyaccel.ops`."""

from pyaccel.reference.crossbar import crossbar_matmul, crossbar_matrix, quantize
from pyaccel.reference.neuron import bntt_lif, lif, poisson_encode, stdb_lif, surrogate_slope
from pyaccel.reference.philox import philox, philox_normal
from pyaccel.reference.qmac import (
    dequantize_sums,
    pack_codes,
    quantize_codes,
    quantized_conv2d,
    quantized_linear,
    unpack_codes,
)
from pyaccel.reference.sram import flip_bits, sram_noise

__all__ = [
    "bntt_lif",
    "crossbar_matmul",
    "crossbar_matrix",
    "dequantize_sums",
    "flip_bits",
    "lif",
    "pack_codes",
    "philox",
    "philox_normal",
    "poisson_encode",
    "quantize",
    "quantize_codes",
    "quantized_conv2d",
    "quantized_linear",
    "sram_noise",
    "stdb_lif",
    "surrogate_slope",
    "unpack_codes",
]
