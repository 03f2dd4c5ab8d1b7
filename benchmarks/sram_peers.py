"""Other tools' own code flipping the bits of int8 words, where it is at hand. None of it is copied here.

davidstutz/random-bit-error-robustness: name a checkout in PYACCEL_PEER_DAVIDSTUTZ; its C loop is compiled as it is, into
a temporary folder. MRFI: installed (`pip install --no-deps mrfi`, with scipy and PyYAML). Its package imports torchvision,
so its two modules are loaded by themselves.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path("common/cffi/cffi.c")


def davidstutz_loop() -> Callable[[Tensor, Tensor, float], Tensor] | None:
    """(words int8 [n], randoms float32 [n, 8], p) -> words with bit b flipped where randoms[:, b] < p; None: not at hand."""
    folder = os.environ.get("PYACCEL_PEER_DAVIDSTUTZ")
    if folder is None:
        return None
    with tempfile.TemporaryDirectory() as build:
        library = Path(build) / "loop.so"
        command = ["gcc", "-O3", "-fopenmp", "-shared", "-fPIC", str(Path(folder) / SOURCE), "-o", str(library), "-lm"]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).cffi_int8randomflip
    function.restype = None

    def flip(words: Tensor, randoms: Tensor, p: float) -> Tensor:
        chance, none = ctypes.c_float(p), (ctypes.c_int * 8)()
        out = torch.empty_like(words)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (randoms, words, out)]
        function(len(words), ctypes.byref(chance), ctypes.byref(chance), none, ctypes.byref(ctypes.c_int(0)), *pointers)
        return out

    return flip


def mrfi() -> Callable[[Tensor, float], Tensor] | None:
    """(words int8, p) -> words: MRFI's own selector, then its own error mode; None: not at hand. p < 1/80, its limit."""
    package = importlib.util.find_spec("mrfi")
    if package is None:
        return None
    folder, found = Path(package.submodule_search_locations[0]), {}
    for name in ("selector", "error_mode"):
        spec = importlib.util.spec_from_file_location(f"mrfi_{name}", folder / f"{name}.py")
        found[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])

    def flip(words: Tensor, p: float) -> Tensor:
        out = words.clone()
        positions = found["selector"].RandomPositionByRate(out.shape, 8 * p)
        out[positions] = found["error_mode"].IntRandomBitFlip(out[positions], 8)
        return out

    return flip
