"""Plain-torch twins of the crossbar kernels: the ladder recurrence as `../docs/crossbar.md` derives it, and the tiled
product with converters, one row tile after another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyaccel.reference.philox import READ_NOISE, philox_normal


def crossbar_matrix(
    conductance: Tensor, *, r_driver: float, r_wire_row: float, r_wire_col: float, r_sense: float
) -> Tensor:
    """Twin of `pyaccel.ops.crossbar_matrix`, which documents it; differentiable by autograd, zero conductance included.

    A row wire with its driver, seen from its N devices, is the impedance Z; loaded with the devices, the admittance S
    between the column nodes. Going down the columns, Y is the admittance of the rows so far and J the Norton currents.
    """
    *batch, rows, columns = conductance.shape
    if conductance.numel() == 0:
        return conductance.clone()
    g = conductance.reshape(-1, rows, columns)
    place = torch.arange(columns, dtype=g.dtype, device=g.device)
    impedance = r_driver + r_wire_row * torch.minimum(place[:, None], place[None, :])
    eye = torch.eye(columns, dtype=g.dtype, device=g.device)
    admittance, currents = None, []
    for row in g.unbind(1):
        # (diag(1/g) + Z)^-1 = (1 + diag(g) Z)^-1 diag(g): finite for g = 0
        s = torch.linalg.solve(eye + row[:, :, None] * impedance, torch.diag_embed(row))
        if admittance is None:
            admittance = s
        else:
            through = torch.linalg.inv(eye + r_wire_col * admittance)  # one wire segment of every column
            currents = [through @ j for j in currents]
            admittance = through @ admittance + s
            admittance = (admittance + admittance.mT) / 2
        currents.append(s.sum(-1, keepdim=True))
    effective = torch.linalg.solve(eye + r_sense * admittance, torch.cat(currents, -1))
    return effective.mT.reshape(*batch, rows, columns)


def quantize(x: Tensor, bits: int, full_scale: Tensor | float) -> Tensor:
    """A symmetric converter: 2^bits - 1 levels from -full_scale to full_scale, zero among them, clipped, half to even.

    A full scale of 0 converts everything to 0.
    """
    top = 2 ** (bits - 1) - 1
    full_scale = torch.as_tensor(full_scale, dtype=x.dtype, device=x.device)
    step = full_scale.clamp_min(torch.finfo(x.dtype).tiny * 2.0**20) / top
    return torch.clamp(torch.round(x * (1 / step)), -top, top) * step


def crossbar_matmul(
    x: Tensor,
    positive: Tensor,
    negative: Tensor | None = None,
    *,
    tile: int,
    read: str = "pair",
    dac_bits: int | None = None,
    dac_range: Tensor | float | None = None,
    adc_bits: int | None = None,
    adc_range: Tensor | float | None = None,
    read_noise: float = 0.0,
    seed: int = 0,
    stream: int = 0,
) -> Tensor:
    """Twin of `pyaccel.ops.crossbar_matmul` (values only: gradients here are those of rounding, hence zero)."""
    inputs, outputs = positive.shape
    flat = x.reshape(math.prod(x.shape[:-1]), inputs)
    if dac_bits is not None:
        flat = quantize(flat, dac_bits, flat.abs().amax() if dac_range is None else dac_range)
    if negative is None:
        arrays = [(1.0, positive)]
    elif read == "pair":
        arrays = [(1.0, positive - negative)]
    else:
        arrays = [(1.0, positive), (-1.0, negative)]
    total = flat.new_zeros(flat.shape[0], outputs)
    reads = 0
    for first in range(0, inputs, tile):
        for sign, array in arrays:
            partial = flat[:, first : first + tile] @ array[first : first + tile]
            if read_noise:
                count = partial.numel()
                noise = philox_normal(seed, stream, READ_NOISE, reads * count, count).to(partial.device, partial.dtype)
                partial = partial + read_noise * noise.reshape(partial.shape)
            reads += 1
            if adc_bits is not None:
                partial = quantize(partial, adc_bits, adc_range)
            total = total + sign * partial
    return total.reshape(*x.shape[:-1], outputs)
