"""Numbers of real devices: dataclasses that name symbol, unit and source of every constant."""

from pyaccel.hardware.cost import Cost, LayerCost, cost, count, layer_costs, training_compute
from pyaccel.hardware.crossbar import CrossbarConfig
from pyaccel.hardware.energy import FLOAT32_45NM, INT32_45NM, SpikeEnergy
from pyaccel.hardware.mac import MacEnergy, compression, efficiency
from pyaccel.hardware.sram import CURVES, SramConfig, VoltageCurve, measured_magnitude

__all__ = [
    "CURVES",
    "Cost",
    "CrossbarConfig",
    "FLOAT32_45NM",
    "INT32_45NM",
    "LayerCost",
    "MacEnergy",
    "SpikeEnergy",
    "SramConfig",
    "VoltageCurve",
    "compression",
    "cost",
    "count",
    "efficiency",
    "layer_costs",
    "measured_magnitude",
    "training_compute",
]
