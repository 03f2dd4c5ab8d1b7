"""Numbers of real devices: dataclasses that name symbol, unit and source of every constant; and what a network costs."""

from pyaccel.hardware.mac import LayerCost, MacEnergy, compression, efficiency, layer_costs

__all__ = ["LayerCost", "MacEnergy", "compression", "efficiency", "layer_costs"]
