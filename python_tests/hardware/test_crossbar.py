"""`CrossbarConfig` and the mapping: layout, factors, variation statistics, and the gain table of the specification."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pyaccel import reference
from pyaccel.hardware import CrossbarConfig
from pyaccel.hardware.mapping import LOWEST, conductances, from_tiles, gain, normals, program, to_tiles
from pyaccel.nn.analog import effective_arrays, effective_weight
from pyaccel.reference.philox import DEVICE_VARIATION


def weight(inputs=21, outputs=13, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return torch.randn(inputs, outputs, dtype=dtype)


LAYOUTS = [
    dict(),
    dict(interleave=True),
    dict(scheme="offset"),
    dict(padding="absent"),
    dict(weight_bits=8, slice_bits=2),
    dict(weight_bits=8, slice_bits=8, interleave=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rows, columns", [(8, 8), (5, 6), (64, 64)])
def test_layout_and_back(layout, rows, columns):
    """Without wires, what comes back from the tiles is the weight (quantised, where sliced)."""
    w, config = weight(), CrossbarConfig(rows=rows, columns=columns, **layout)
    g, factor = conductances(w, config)
    assert (g >= config.g_min * (1 - 1e-12)).all() and (g <= config.g_max * (1 + 1e-12)).all()
    tiles = to_tiles(g, config)
    assert tiles.shape[-2:] == (rows, columns + (config.scheme == "offset"))
    arrays = from_tiles(tiles, factor, tuple(w.shape), config)
    back = (arrays[:, 0] - arrays[:, 1] if arrays.shape[1] == 2 else arrays[:, 0]).sum(0)
    tolerance = 1e-12 if config.slice_bits is None else w.abs().max() / 255 / 2 + 1e-9
    assert (back - w).abs().max() <= tolerance


def test_zero_weight_is_the_zero_matrix():
    assert (effective_weight(torch.zeros(9, 4), CrossbarConfig(rows=4, columns=4), chip=0) == 0).all()


def test_levels_round_and_pass_the_gradient():
    w, config = weight().requires_grad_(), CrossbarConfig(levels=4)
    g, _ = conductances(w, config)
    steps = (g - config.g_min) / ((config.g_max - config.g_min) / 3)
    assert (steps - steps.round()).abs().max() < 1e-9
    (grad,) = torch.autograd.grad(g[0, 0].sum(), w)
    assert ((grad != 0) == (w > 0)).all()


def test_first_and_last_segment_belong_to_the_terminals():
    assert CrossbarConfig().resistances() == dict(r_driver=1e3, r_wire_row=5.0, r_wire_col=10.0, r_sense=1e3)
    both = CrossbarConfig(first_segment=True, last_segment=True).resistances()
    assert both == dict(r_driver=1005.0, r_wire_row=5.0, r_wire_col=10.0, r_sense=1010.0)


# --------------------------------------------------------------------------------------- variation, stuck cells
def test_variation_statistics():
    config = CrossbarConfig(variation=0.1)
    cells = program(torch.full((1, 1, 10, 10, 64, 64), 2e-5, dtype=torch.float64), config, chip=3, stream=1)
    ratio = cells / 2e-5
    assert abs(ratio.std().item() - 0.10) < 0.002 and abs(ratio.mean().item() - 1) < 5e-4
    again = program(torch.full((1, 1, 10, 10, 64, 64), 2e-5, dtype=torch.float64), config, chip=3, stream=1)
    assert torch.equal(cells, again)
    other = program(torch.full((1, 1, 10, 10, 64, 64), 2e-5, dtype=torch.float64), config, chip=4, stream=1)
    assert torch.corrcoef(torch.stack([cells.flatten(), other.flatten()]))[0, 1].abs() < 0.01


def test_variation_never_makes_a_negative_device_and_leaves_absent_cells_alone():
    tiles = torch.full((1, 1, 1, 1, 64, 64), 2e-5)
    tiles[..., :5] = 0.0
    cells = program(tiles, CrossbarConfig(variation=2.0), chip=0, stream=0)
    assert (cells[..., :5] == 0).all() and (cells[..., 5:] >= LOWEST * 0.999).all()
    assert (cells[..., 5:] == torch.tensor(LOWEST)).any()


def test_normals_are_those_of_the_reference():
    drawn = normals(2**63 + 5, 77, 1003)
    twin = reference.philox_normal(2**63 + 5, 77, DEVICE_VARIATION, 0, 1003)
    assert (drawn - twin).abs().max() < 3e-6
    assert abs(normals(0, 0, 400_000).pow(4).mean().item() - 3) < 0.05


def test_stuck_cells():
    config = CrossbarConfig(stuck_on=0.1, stuck_off=0.05)
    cells = program(torch.full((1, 1, 5, 5, 64, 64), 2e-5, dtype=torch.float64), config, chip=1, stream=9)
    on, off = (cells == config.g_max).double().mean().item(), (cells == config.g_min).double().mean().item()
    assert abs(on - 0.1) < 0.004 and abs(off - 0.05) < 0.003
    assert ((cells == 2e-5) | (cells == config.g_max) | (cells == config.g_min)).all()


# ------------------------------------------------------------------------- the gain table of the specification
def slope_and_residue(spread, size, **options):
    found = []
    config = CrossbarConfig(rows=size, columns=size, calibration="none", **options)
    for seed in range(3):
        torch.manual_seed(seed)
        w = (torch.randn(2 * size, 2 * size, dtype=torch.float64) * spread).clamp(-1, 1)
        w[0, -1] = 1.0  # w_max, in a tile of its own that is not looked at
        w, effective = w[:, :size], effective_weight(w, config, chip=seed)[:, :size]
        slope = gain(effective, w, False)
        found.append((slope.item(), ((effective - slope * w).square().mean().sqrt() / (slope * w.square().mean().sqrt())).item()))
    return torch.tensor(found).mean(0).tolist()


@pytest.mark.parametrize(
    "spread, size, slope, residue, tolerance",
    [
        # The residue of a small tile spreads by more than 5 % between draws of its few weights.
        (0.05, 16, 0.820, 0.026, 0.25), (0.10, 32, 0.648, 0.040, 0.25), (0.25, 16, 0.723, 0.052, 0.25),
        (0.25, 64, 0.342, 0.082, 0.25), (0.05, 64, 0.480, 0.058, 0.05), (0.10, 64, 0.436, 0.068, 0.05), (0.05, 128, 0.253, 0.158, 0.05),
        (0.10, 128, 0.219, 0.178, 0.05), (0.25, 128, 0.151, 0.239, 0.05),
    ],
)  # fmt: skip
def test_gain_table(spread, size, slope, residue, tolerance):
    found = slope_and_residue(spread, size)
    assert abs(found[0] - slope) < 0.05 * slope
    assert abs(found[1] - residue) < tolerance * residue


def test_gain_of_wires_only():
    found = slope_and_residue(0.25, 64, r_driver=1.0, r_sense=1.0)
    assert abs(found[0] - 0.832) < 0.05 * 0.832


def test_offset_columns_are_much_worse():
    assert slope_and_residue(0.25, 16, scheme="offset")[0] < 0.7 * slope_and_residue(0.25, 16)[0]


def test_gain_falls_with_the_tile_and_rises_with_the_resistance():
    slopes = [slope_and_residue(0.1, n)[0] for n in (8, 16, 32)]
    assert slopes == sorted(slopes, reverse=True)
    assert slope_and_residue(0.1, 16, r_min=40e3, r_max=400e3)[0] > slopes[1]


def test_calibrations():
    w = weight(100, 40)
    none, layer, column = (
        effective_weight(w, CrossbarConfig(rows=32, columns=16, calibration=c), chip=0)
        for c in ("none", "layer_gain", "column_gain")
    )
    assert gain(none, w, False) < 0.9
    torch.testing.assert_close(layer, none / gain(none, w, False))
    torch.testing.assert_close(gain(column, w, True), torch.ones(40, dtype=torch.float64))
    assert (column - w).norm() < (layer - w).norm() < (none - w).norm()


def test_three_tiles_equal_the_manual_sum():
    from pyaccel import ops

    config = CrossbarConfig(rows=8, columns=16, calibration="none")
    w, x = weight(20, 10), torch.randn(4, 20, dtype=torch.float64)
    span, largest = config.g_max - config.g_min, w.abs().max()
    total = 0
    for first in (0, 8, 16):
        part = w[first : first + 8]
        arrays = []
        for sign in (1, -1):
            cells = torch.full((8, 16), config.g_min, dtype=torch.float64)
            cells[: len(part), :10] += span * (sign * part).clamp_min(0) / largest
            arrays.append(ops.crossbar_matrix(cells, **config.resistances())[: len(part), :10])
        total = total + x[:, first : first + 8] @ (arrays[0] - arrays[1]) * largest / span
    torch.testing.assert_close(x @ effective_weight(w, config, chip=0), total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_gradient_through_the_solver(layout):
    w = weight(7, 5)
    fixed = w.clone()
    config = CrossbarConfig(rows=4, columns=4, calibration="none", gradient="solver", **layout)
    largest = fixed.abs() == fixed.abs().max()

    def mapped(v):
        # The scale w_max is a constant to the gradient: keep it one.
        return effective_weight(torch.where(largest, fixed, v), config, chip=0)

    assert torch.autograd.gradcheck(mapped, w.requires_grad_(), eps=1e-6, atol=1e-6)


def test_slices_add_up():
    w = weight()
    sliced = CrossbarConfig(rows=8, columns=8, weight_bits=8, slice_bits=4, calibration="none")
    assert effective_arrays(w, sliced, chip=0, stream=0).shape == (2, 2, 21, 13)
    ideal = dataclasses.replace(sliced, r_driver=0.0, r_wire_row=0.0, r_wire_col=0.0, r_sense=0.0)
    assert (effective_weight(w, ideal, chip=0) - w).abs().max() <= w.abs().max() / 255 / 2 + 1e-9


def test_label_names_what_is_not_default():
    assert CrossbarConfig().label() == "64x64 differential layer_gain"
    assert CrossbarConfig(rows=16, variation=0.1).label() == "16x64 differential layer_gain variation=0.1"


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(scheme="double"), "scheme must be one of differential, offset, got 'double'"),
        (dict(calibration="gain"), "calibration must be one of none, layer_gain"),
        (dict(rows=0), "rows must be at least 1, got 0"),
        (dict(r_min=3e5), "r_min must be above 0 and below r_max = 200000, got 300000"),
        (dict(r_sense=-1.0), "r_sense must be finite and at least 0"),
        (dict(stuck_on=0.7, stuck_off=0.6), "stuck_off must be at most 1 - stuck_on"),
        (dict(levels=1), "levels must be None or at least 2"),
        (dict(interleave=True, columns=7), "interleave needs .* an even number of columns"),
        (dict(scheme="offset", read="apart"), "read='apart' needs scheme='differential'"),
        (dict(weight_bits=8), "weight_bits and slice_bits go together"),
        (dict(weight_bits=8, slice_bits=3), "slice_bits must be a divisor of weight_bits = 8"),
        (dict(weight_bits=8, slice_bits=2, gradient="solver"), "slices need"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        CrossbarConfig(**options)
