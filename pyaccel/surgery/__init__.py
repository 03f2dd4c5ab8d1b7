"""Model in, new model out; the input stays untouched."""

from pyaccel.surgery.crossbars import analog_layers, calibrate_converters, reestimate_batchnorm, to_crossbars
from pyaccel.surgery.memory import with_noisy_memory, without_noisy_memory
from pyaccel.surgery.quantize import quantize

__all__ = [
    "analog_layers",
    "calibrate_converters",
    "quantize",
    "reestimate_batchnorm",
    "to_crossbars",
    "with_noisy_memory",
    "without_noisy_memory",
]
