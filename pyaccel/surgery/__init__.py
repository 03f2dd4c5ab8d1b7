"""Model in, new model out; the input stays untouched."""

from pyaccel.surgery.activations import activation_means, unwatch_activations, watch_activations
from pyaccel.surgery.crossbars import analog_layers, calibrate_converters, reestimate_batchnorm, to_crossbars
from pyaccel.surgery.factorize import factorize, merge_factors
from pyaccel.surgery.grow import deepen, widen
from pyaccel.surgery.memory import noisy_sites, with_noisy_memory, without_noisy_memory
from pyaccel.surgery.nir import to_nir
from pyaccel.surgery.nir_read import from_nir
from pyaccel.surgery.prune import hold_pruned, prune_filters, pruned_filters
from pyaccel.surgery.quantize import quantize
from pyaccel.surgery.shrink import like_tensors, shrink
from pyaccel.surgery.spiking import to_spiking
from pyaccel.surgery.streaming import stream_logits, streaming
from pyaccel.surgery.thresholds import balance_thresholds, thresholds

__all__ = [
    "activation_means",
    "analog_layers",
    "balance_thresholds",
    "calibrate_converters",
    "deepen",
    "factorize",
    "from_nir",
    "hold_pruned",
    "like_tensors",
    "merge_factors",
    "noisy_sites",
    "prune_filters",
    "pruned_filters",
    "quantize",
    "reestimate_batchnorm",
    "shrink",
    "stream_logits",
    "streaming",
    "thresholds",
    "to_crossbars",
    "to_nir",
    "to_spiking",
    "unwatch_activations",
    "watch_activations",
    "widen",
    "with_noisy_memory",
    "without_noisy_memory",
]
