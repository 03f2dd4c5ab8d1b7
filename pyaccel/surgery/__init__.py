"""A model in, a new model out."""

from pyaccel.surgery.crossbars import analog_layers, calibrate_converters, reestimate_batchnorm, to_crossbars

__all__ = ["analog_layers", "calibrate_converters", "reestimate_batchnorm", "to_crossbars"]
