"""Plain-torch twins of every kernel, written for reading: same names and arguments as in `pyaccel.ops`."""

from pyaccel.reference.neuron import bntt_lif, lif, poisson_encode, stdb_lif, surrogate_slope
from pyaccel.reference.philox import philox
from pyaccel.reference.sram import flip_bits, sram_noise

__all__ = [
    "bntt_lif",
    "flip_bits",
    "lif",
    "philox",
    "poisson_encode",
    "sram_noise",
    "stdb_lif",
    "surrogate_slope",
]
