"""Plain-torch twins of every kernel, written for reading: same names and arguments as in `pyaccel.ops`."""

from pyaccel.reference.neuron import bntt_lif, lif, poisson_encode, stdb_lif, surrogate_slope
from pyaccel.reference.philox import philox
from pyaccel.reference.qmac import (
    dequantize_sums,
    pack_codes,
    quantize_codes,
    quantized_conv2d,
    quantized_linear,
    unpack_codes,
)

__all__ = [
    "bntt_lif",
    "dequantize_sums",
    "lif",
    "pack_codes",
    "philox",
    "poisson_encode",
    "quantize_codes",
    "quantized_conv2d",
    "quantized_linear",
    "stdb_lif",
    "surrogate_slope",
    "unpack_codes",
]
