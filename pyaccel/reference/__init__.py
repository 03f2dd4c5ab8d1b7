"""Plain-torch twins of every kernel, written for reading: same names and arguments as in `pyaccel.ops`."""

from pyaccel.reference.neuron import bntt_lif, lif, poisson_encode, stdb_lif, surrogate_slope
from pyaccel.reference.philox import philox

__all__ = ["bntt_lif", "lif", "philox", "poisson_encode", "stdb_lif", "surrogate_slope"]
