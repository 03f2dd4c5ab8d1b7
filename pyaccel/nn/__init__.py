"""Modules with parameters and explicit state over the operators of `pyaccel.ops`."""

from pyaccel.nn.analog import AnalogConv2d, AnalogLinear

__all__ = ["AnalogConv2d", "AnalogLinear"]
