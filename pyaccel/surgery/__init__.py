"""Model in, new model out; the input stays untouched."""

from pyaccel.surgery.crossbars import analog_layers, calibrate_converters, reestimate_batchnorm, to_crossbars
from pyaccel.surgery.factorize import factorize, merge_factors
from pyaccel.surgery.memory import with_noisy_memory, without_noisy_memory
from pyaccel.surgery.quantize import quantize
from pyaccel.surgery.spiking import to_spiking
from pyaccel.surgery.streaming import stream_logits, streaming
from pyaccel.surgery.thresholds import balance_thresholds, thresholds

__all__ = [
    "analog_layers",
    "balance_thresholds",
    "calibrate_converters",
    "factorize",
    "merge_factors",
    "quantize",
    "reestimate_batchnorm",
    "stream_logits",
    "streaming",
    "thresholds",
    "to_crossbars",
    "to_spiking",
    "with_noisy_memory",
    "without_noisy_memory",
]
