"""Spikes as bits: `pack_spikes`, `unpack_spikes`, and the bit planes in which layers keep the spikes they have read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyaccel import extension
from pyaccel.ops import checks
from pyaccel.ops.library import register

# Bits a value for each kind of spikes: {0, 1}; {-1, 0, 1}; 2x2 means of binary spikes, {0, 1/4 .. 1}; of signed ones.
KINDS = {"binary": 1, "signed": 2, "pooled": 3, "pooled_signed": 4}


def pack_spikes(spikes: Tensor) -> Tensor:
    """Binary spikes `[T, ...]` as bits: uint8 `[T, ceil(N / 8)]`, N the values of one step.

    Value n of a step, counted in logical (C) order, is bit `n % 8` of byte `n // 8`. No gradient.

    Raises:
        ValueError: a value other than 0 and 1 (checked on the CPU; a GPU is not waited for).
    """
    checks.floating("pack_spikes", "spikes", spikes, 1, "[T, ...]")
    return pack("pack_spikes", spikes.detach().contiguous(), "binary")[0]


def unpack_spikes(packed: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The spikes `[T, ...]` of `shape` and `dtype` behind `pack_spikes`."""
    shape = tuple(shape)
    if not shape or dtype not in checks.FLOATING:
        raise ValueError(f"unpack_spikes: shape must be [T, ...] and dtype floating, got {list(shape)} and {dtype}")
    row = math.prod(shape[1:])
    if not isinstance(packed, Tensor):
        raise TypeError(f"unpack_spikes: packed must be a torch.Tensor, got {checks.shape_of(packed)}")
    checks.like("unpack_spikes", "packed", packed, (shape[0], (row + 7) // 8), torch.uint8, packed.device)
    return _unpack(packed.contiguous()[None], 1, list(shape), list(torch.empty(shape, device="meta").stride()), dtype)


def pack(op: str, spikes: Tensor, kind: str) -> Tensor:
    """Dense spikes `[rows, ...]` as bit planes `[planes, rows, ceil(N / 8)]` in memory order."""
    planes = KINDS[kind]
    if spikes.numel() == 0:  # counts as contiguous whatever its strides are, which the kernel compares
        spikes = spikes.new_empty(spikes.shape)
    packed, good = _pack(spikes, planes)
    checked = spikes.device.type == "cpu" and type(good) is Tensor and not torch.compiler.is_compiling()
    if checked and not bool(good):
        raise ValueError(
            f"{op}: the spikes hold values that kind={kind!r} cannot store; kinds are binary (0, 1), signed (-1, 0, 1), "
            "pooled (0, 1/4 .. 1) and pooled_signed"
        )
    return packed


def unpack(packed: Tensor, kind: str, like: tuple) -> Tensor:
    """The spikes again, in the shape, strides and dtype of `like` (see `layout_of`)."""
    shape, strides, dtype = like
    return _unpack(packed, KINDS[kind], list(shape), list(strides), dtype)


def layout_of(spikes: Tensor) -> tuple:
    return tuple(spikes.shape), tuple(spikes.stride()), spikes.dtype


def _packed_like(spikes: Tensor, planes: int) -> Tensor:
    row = math.prod(spikes.shape[1:])
    return spikes.new_empty((planes, spikes.shape[0], (row + 7) // 8), dtype=torch.uint8)


def _pack_kernel(spikes, planes):
    packed = _packed_like(spikes, planes)
    good = spikes.numel() == 0 or extension._C.neuron.pack(spikes, packed, planes)
    return packed, torch.tensor(good)


def _pack_fake(spikes, planes):
    return _packed_like(spikes, planes), torch.empty((), dtype=torch.bool, device="cpu")


def _unpack_kernel(packed, planes, shape, strides, dtype):
    spikes = torch.empty_strided(shape, strides, dtype=dtype, device=packed.device)
    if spikes.numel():
        extension._C.neuron.unpack(packed, spikes, planes)
    return spikes


def _unpack_fake(packed, planes, shape, strides, dtype):
    return torch.empty_strided(shape, strides, dtype=dtype, device=packed.device)


def _memory_rows(spikes: Tensor) -> Tensor:
    """`[rows, N]` in memory order, sharing the storage of dense `spikes`."""
    return spikes.as_strided((spikes.shape[0], math.prod(spikes.shape[1:])), (spikes.stride(0), 1))


def plain_pack(spikes: Tensor, planes: int) -> Tensor:
    rows = _memory_rows(spikes)
    code = (rows * (4 if planes >= 3 else 1)).to(torch.int64)
    code = torch.nn.functional.pad(code, (0, -code.shape[1] % 8)).unflatten(1, (-1, 8))
    place = torch.arange(8, device=code.device)
    return torch.stack([(((code >> k) & 1) << place).sum(-1) for k in range(planes)]).to(torch.uint8)


def plain_unpack(packed: Tensor, out: Tensor, planes: int) -> Tensor:
    place = torch.arange(8, device=packed.device)
    bits = ((packed.to(torch.int64)[..., None] >> place) & 1).flatten(-2)
    code = sum(bits[k] << k for k in range(planes))
    if planes % 2 == 0:
        code = torch.where(code >= 1 << (planes - 1), code - (1 << planes), code)
    rows = _memory_rows(out)
    rows.copy_(code[:, : rows.shape[1]] * (0.25 if planes >= 3 else 1.0))
    return out


def _unpack_fallback(packed, planes, shape, strides, dtype):
    return plain_unpack(packed, _unpack_fake(packed, planes, shape, strides, dtype), planes)


def _pack_fallback(spikes, planes):
    packed = plain_pack(spikes, planes)
    return packed, torch.tensor(bool((plain_unpack(packed, torch.empty_like(spikes), planes) == spikes).all()))


_pack = register(
    "pack_spikes(Tensor spikes, int planes) -> (Tensor, Tensor)",
    kernel=_pack_kernel,
    fake=_pack_fake,
    fallback=_pack_fallback,
)
_unpack = register(
    "unpack_spikes(Tensor packed, int planes, int[] shape, int[] strides, ScalarType dtype) -> Tensor",
    kernel=_unpack_kernel,
    fake=_unpack_fake,
    fallback=_unpack_fallback,
)
