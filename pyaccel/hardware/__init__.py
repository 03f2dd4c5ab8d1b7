"""Numbers of real devices: dataclasses that name symbol, unit and source of every constant."""

from pyaccel.hardware.crossbar import CrossbarConfig
from pyaccel.hardware.energy import FLOAT32_45NM, INT32_45NM, SpikeEnergy
from pyaccel.hardware.mac import LayerCost, MacEnergy, compression, efficiency, layer_costs
from pyaccel.hardware.sram import CURVES, SramConfig, VoltageCurve, measured_magnitude

__all__ = [
    "CURVES",
    "CrossbarConfig",
    "FLOAT32_45NM",
    "INT32_45NM",
    "LayerCost",
    "MacEnergy",
    "SpikeEnergy",
    "SramConfig",
    "VoltageCurve",
    "compression",
    "efficiency",
    "layer_costs",
    "measured_magnitude",
]
