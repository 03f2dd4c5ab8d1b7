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

from pyaccel.ops import flops as _flops  # noqa: E402,F401  (after the operators that it describes)

__all__ = [
    "bntt_lif",
    "dequantize_sums",
    "lif",
    "pack_codes",
    "poisson_encode",
    "quantize_codes",
    "quantized_conv2d",
    "quantized_linear",
    "unpack_codes",
]
