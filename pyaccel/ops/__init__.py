"""Differentiable torch operators over the kernels. Functions take and return their state; time comes first."""


from pyaccel.ops.bntt import bntt_lif
from pyaccel.ops.encode import poisson_encode
from pyaccel.ops.lif import lif
from pyaccel.ops.sram import flip_bits, flip_bits_, sram_noise

from pyaccel.ops import flops as _flops  # noqa: E402,F401  (after the operators that it describes)

__all__ = ["bntt_lif", "flip_bits", "flip_bits_", "lif", "poisson_encode", "sram_noise"]
