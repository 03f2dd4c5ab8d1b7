"""Numbers of real devices: dataclasses that name symbol, unit and source of every constant."""

from pyaccel.hardware.crossbar import CrossbarConfig

__all__ = ["CrossbarConfig"]
