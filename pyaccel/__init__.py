"""pyaccel: neural networks trained, converted, attacked and defended on the hardware they will run on.

Fused C++/CUDA kernels under differentiable PyTorch operators (`pyaccel.ops`), modules over them (`pyaccel.nn`), networks
(`pyaccel.models`), and published methods as recipes (`python -m pyaccel list`).
"""

import torch as _torch  # first: its OpenMP runtime must be the one that the kernels find  # noqa: F401

from pyaccel import hardware, models, nn, ops, reference, surgery
from pyaccel.memory import recycle_memory, release_memory
from pyaccel.version import __version__

__all__ = [
    "__version__",
    "hardware",
    "models",
    "nn",
    "ops",
    "recycle_memory",
    "reference",
    "release_memory",
    "surgery",
]
