"""Plain-torch twins of every kernel, written for reading: same names and arguments as in `pyaccel.ops`."""

from pyaccel.reference.crossbar import crossbar_matmul, crossbar_matrix, quantize
from pyaccel.reference.neuron import bntt_lif, lif, poisson_encode, stdb_lif, surrogate_slope
from pyaccel.reference.philox import philox, philox_normal

__all__ = [
    "bntt_lif",
    "crossbar_matmul",
    "crossbar_matrix",
    "lif",
    "philox",
    "philox_normal",
    "poisson_encode",
    "quantize",
    "stdb_lif",
    "surrogate_slope",
]
