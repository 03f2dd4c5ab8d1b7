"""Numbers of real devices: dataclasses that name symbol, unit and source of every constant."""

from pyaccel.hardware.sram import CURVES, SramConfig, VoltageCurve, measured_magnitude

__all__ = ["CURVES", "SramConfig", "VoltageCurve", "measured_magnitude"]
