"""Numbers of real devices as dataclasses, and what a network costs on them."""

from pyaccel.hardware.mac import LayerCost, MacEnergy, compression, efficiency, layer_costs

__all__ = ["LayerCost", "MacEnergy", "compression", "efficiency", "layer_costs"]
