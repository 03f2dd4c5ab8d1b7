"""From a weight matrix to the conductances of crossbar tiles, and from their effective conductances back to weights.

`[K, C]`: K inputs drive rows, C outputs are columns. Everything here is plain tensor arithmetic and differentiable in
the weights (rounding to levels is straight-through); the wires come in between: `ops.crossbar_matrix`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.hardware.crossbar import CrossbarConfig
from pyaccel.reference.philox import DEVICE_VARIATION

LOWEST = 1e-9  # siemens: no varied device conducts less


def conductances(weight: Tensor, config: CrossbarConfig) -> tuple[Tensor, Tensor]:
    """Programmed conductances `[A, S, K, C]` (A arrays: positive and negative, or one; S slices) of a weight `[K, C]`,
    and the factor `[S]` that turns differences of conductance into weights. 2008.11298 and docs/crossbar.md,
    "Mapping"."""
    largest = weight.detach().abs().amax().clamp_min(torch.finfo(weight.dtype).tiny * 2.0**20)
    span = config.g_max - config.g_min
    if config.scheme == "offset":
        middle = (config.g_max + config.g_min) / 2
        g = (middle + weight / largest * (span / 2))[None, None]
        return _to_levels(g, config), 2 * largest / span * weight.new_ones(1)
    parts = torch.stack([weight.clamp_min(0), (-weight).clamp_min(0)]) / largest
    if config.slice_bits is None:
        return _to_levels(config.g_min + span * parts[:, None], config), largest / span * weight.new_ones(1)
    top, base = 2**config.weight_bits - 1, 2**config.slice_bits
    codes = torch.round(parts.detach() * top).to(torch.int64)
    digits = torch.stack([codes // base**s % base for s in range(config.slices)], 1)
    factor = weight.new_tensor([base**s * (base - 1) / top for s in range(config.slices)])
    g = config.g_min + span / (base - 1) * digits.to(weight.dtype)
    return _to_levels(g, config), factor * largest / span


def _to_levels(g: Tensor, config: CrossbarConfig) -> Tensor:
    if config.levels is None:
        return g
    step = (config.g_max - config.g_min) / (config.levels - 1)
    rounded = config.g_min + torch.round((g.detach() - config.g_min) / step) * step
    return g + (rounded - g.detach())


def to_tiles(g: Tensor, config: CrossbarConfig) -> Tensor:
    """`[A, S, K, C]` cut into padded tiles `[S, A', row tiles, column tiles, M, N']`: A' = 1 where arrays interleave or
    with the dummy column (then N' = N + 1), else A."""
    if config.interleave:
        g = torch.stack([g[0], g[1]], -1).flatten(-2)[None]
    fill = config.g_min if config.padding == "g_min" else 0.0
    *_, inputs, outputs = g.shape
    short = (-outputs % config.columns, -inputs % config.rows)
    g = torch.nn.functional.pad(g, (0, short[0], 0, short[1]), value=fill)
    g = g.unflatten(-1, (-1, config.columns)).unflatten(-3, (-1, config.rows)).transpose(-2, -3)
    if config.scheme == "offset":
        dummy = g.new_full((*g.shape[:-1], 1), (config.g_max + config.g_min) / 2)
        g = torch.cat([g, dummy], -1)
    return g.transpose(0, 1)


def from_tiles(tiles: Tensor, factor: Tensor, shape: tuple[int, int], config: CrossbarConfig) -> Tensor:
    """Effective conductances of `to_tiles` as weights of each array, `[S, A, K, C]` in units of the weights: array 0
    minus array 1 is what the chip computes (one array with the dummy column: already subtracted)."""
    inputs, outputs = shape
    if config.scheme == "offset":
        tiles = tiles[..., :-1] - tiles[..., -1:]
    g = tiles.transpose(-2, -3).flatten(-2).flatten(-3, -2)
    if config.interleave:
        g = torch.cat([g[..., 0::2], g[..., 1::2]], 1)
    return g[..., :inputs, :outputs] * factor[:, None, None, None]


def program(tiles: Tensor, config: CrossbarConfig, *, chip: int, stream: int) -> Tensor:
    """What sits in the cells of chip number `chip`: device variation, then stuck cells; the same on every device.

    Cells are numbered in the memory order of `tiles`; draws are of counter domain 4: normals on `stream`, the words
    that decide about stuck cells on `stream + 1`.
    """
    if config.variation:
        normal = normals(chip, stream, tiles.numel()).to(tiles.device, tiles.dtype).reshape(tiles.shape)
        absent = tiles.detach() == 0
        tiles = torch.where(absent, tiles, (tiles * (1 + config.variation * normal)).clamp_min(LOWEST))
    if config.stuck_on or config.stuck_off:
        words = reference.philox(chip, torch.arange((tiles.numel() + 3) // 4), 0, stream + 1, DEVICE_VARIATION)
        draw = (words.reshape(-1)[: tiles.numel()].to(torch.float64) / 2**32).reshape(tiles.shape).to(tiles.device)
        tiles = torch.where(draw < config.stuck_on, config.g_max, tiles)
        stuck_off = (draw >= config.stuck_on) & (draw < config.stuck_on + config.stuck_off)
        tiles = torch.where(stuck_off, config.g_min, tiles)
    return tiles


def normals(seed: int, stream: int, count: int) -> Tensor:
    """Standard normal draws of the device variation, float32 `[count]` on the CPU (`reference.philox_normal`)."""
    if extension._C is None:
        return reference.philox_normal(seed, stream, DEVICE_VARIATION, 0, count).float()
    out = torch.empty(count)
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    extension._C.crossbar.normal(signed, stream % (1 << 32), DEVICE_VARIATION, 0, out)
    return out


def gain(effective: Tensor, weight: Tensor, per_column: bool) -> Tensor:
    """Least-squares gain of the effective on the wanted weight, `<W_eff, W> / <W, W>`, 0-d or `[C]`; 1 where W = 0."""
    over = (0,) if per_column else (0, 1)
    power = (weight * weight).sum(over)
    slope = (effective * weight).sum(over) / torch.where(power > 0, power, 1.0)
    return torch.where((power > 0) & (slope != 0), slope, 1.0)
