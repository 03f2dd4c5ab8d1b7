"""Differentiable torch operators over the kernels. Functions take and return their state; time comes first."""


from pyaccel.ops.bntt import bntt_lif
from pyaccel.ops.encode import poisson_encode
from pyaccel.ops.lif import lif
from pyaccel.ops.qmac import (
    dequantize_sums,
    pack_codes,
    quantize_codes,
    quantized_conv2d,
    quantized_linear,
    unpack_codes,
)
from pyaccel.ops.quantizers import fake_quantize, quantize_affine, quantize_range, quantize_symmetric, weight_grid

from pyaccel.ops import flops as _flops  # noqa: E402,F401  (after the operators that it describes)

__all__ = [
    "bntt_lif",
    "dequantize_sums",
    "fake_quantize",
    "lif",
    "pack_codes",
    "poisson_encode",
    "quantize_affine",
    "quantize_codes",
    "quantize_range",
    "quantize_symmetric",
    "quantized_conv2d",
    "quantized_linear",
    "unpack_codes",
    "weight_grid",
]
