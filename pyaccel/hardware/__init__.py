"""Numbers of real devices, each with its symbol, unit, range and source, and how networks map onto them."""

from pyaccel.hardware.crossbar import CrossbarConfig

__all__ = ["CrossbarConfig"]
