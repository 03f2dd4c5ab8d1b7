"""Differentiable torch operators over the kernels. Functions take and return their state; time comes first."""


from pyaccel.ops.bntt import bntt_lif
from pyaccel.ops.crossbar_matmul import adc_range, crossbar_matmul
from pyaccel.ops.crossbar_matrix import crossbar_matrix
from pyaccel.ops.encode import poisson_encode
from pyaccel.ops.lif import lif

from pyaccel.ops import flops as _flops  # noqa: E402,F401  (after the operators that it describes)

__all__ = ["adc_range", "bntt_lif", "crossbar_matmul", "crossbar_matrix", "lif", "poisson_encode"]
