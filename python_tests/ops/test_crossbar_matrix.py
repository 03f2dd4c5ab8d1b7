"""`crossbar_matrix` against closed forms, invariants of resistive networks, its plain-torch twin and finite
differences."""

from __future__ import annotations

import sys

import pytest
import torch

from pyaccel import ops, reference

DEFAULT = dict(r_driver=1e3, r_wire_row=5.0, r_wire_col=10.0, r_sense=1e3)
IDEAL = dict(r_driver=0.0, r_wire_row=0.0, r_wire_col=0.0, r_sense=0.0)
SIZES = [(1, 1), (1, 7), (7, 1), (3, 5), (8, 8), (9, 7), (16, 17), (33, 12), (40, 64)]


def tile(rows: int, columns: int, *batch: int, dtype=torch.float64, low=5e-6, high=5e-5, seed=0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.empty(*batch, rows, columns, dtype=dtype).uniform_(low, high)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).abs() / b.double().abs()).max().item()


GOLDEN_IN = [[50, 20, 5, 35], [10, 45, 30, 5], [5, 15, 50, 25], [40, 5, 20, 50]]
GOLDEN_OUT = [
    [40.963962, 16.721274, 4.231216, 28.48855],
    [8.424041, 38.140404, 25.04123, 4.25208],
    [4.283888, 12.755586, 41.467691, 20.638454],
    [32.739404, 4.273141, 16.412593, 40.472164],
]


@pytest.mark.parametrize("solve", [ops.crossbar_matrix, reference.crossbar_matrix], ids=["kernel", "reference"])
def test_golden_4x4(solve):
    out = solve(torch.tensor(GOLDEN_IN, dtype=torch.float64) * 1e-6, **DEFAULT) * 1e6
    assert (out - torch.tensor(GOLDEN_OUT, dtype=torch.float64)).abs().max() < 5.1e-7  # the printed digits
    exchanged = solve(torch.tensor(GOLDEN_IN, dtype=torch.float64) * 1e-6, **{**DEFAULT, "r_wire_row": 10.0, "r_wire_col": 5.0})
    assert (exchanged * 1e6 - torch.tensor(GOLDEN_OUT, dtype=torch.float64)).abs().max() > 1e-3  # row and column wires differ


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_closed_forms(rows, columns, dtype, tolerance):
    g = tile(rows, columns, 2, dtype=dtype)
    g[0, rows // 2, columns // 2] = 0.0
    exact = g.double()
    assert torch.equal(ops.crossbar_matrix(g, **IDEAL), g)
    safe = torch.finfo(torch.float64).tiny
    sense = exact / (1 + 1e3 * exact.sum(-2, keepdim=True))
    assert relative(ops.crossbar_matrix(g, **{**IDEAL, "r_sense": 1e3}).double() + safe, sense + safe) < tolerance
    driver = exact / (1 + 1e3 * exact.sum(-1, keepdim=True))
    assert relative(ops.crossbar_matrix(g, **{**IDEAL, "r_driver": 1e3}).double() + safe, driver + safe) < tolerance


def test_one_cell_is_a_series_of_resistors():
    out = ops.crossbar_matrix(torch.tensor([[1 / 20e3]], dtype=torch.float64), **DEFAULT)
    assert abs(out.item() - 1 / 22e3) < 1e-18 and abs(out.item() * 1e6 - 45.4545) < 1e-4


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 5e-6)])
def test_kernel_equals_the_plain_torch_twin(rows, columns, dtype, tolerance):
    g = tile(rows, columns, 3, dtype=dtype)
    assert relative(ops.crossbar_matrix(g, **DEFAULT), reference.crossbar_matrix(g.double(), **DEFAULT)) < tolerance


@pytest.mark.parametrize("wire", [0.0, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("rows, columns", [(7, 5), (5, 7), (20, 33)])
def test_reciprocity(rows, columns, wire):
    """Exchanging drivers and sense amplifiers transposes the tile; also proves the choice of elimination direction."""
    g = tile(rows, columns)
    out = ops.crossbar_matrix(g, r_driver=300.0, r_wire_row=wire, r_wire_col=2 * wire, r_sense=2e3)
    back = ops.crossbar_matrix(
        g.flip(0, 1).T.contiguous(), r_driver=2e3, r_wire_row=2 * wire, r_wire_col=wire, r_sense=300.0
    )
    assert relative(back, out.flip(0, 1).T) < 1e-12


@pytest.mark.parametrize("rows, columns", SIZES)
def test_passivity(rows, columns):
    g = tile(rows, columns)
    out = ops.crossbar_matrix(g, **DEFAULT)
    assert (out >= 0).all()
    assert (out.sum(0) < g.sum(0)).all() and (out.sum(1) < g.sum(1)).all()


def test_current_conservation():
    """All drivers at one volt: without sense resistors the whole network sits between 1 V and ground, and the current
    into the rows is what comes out of the columns. The driver currents come from the exchanged network."""
    g = tile(6, 9)
    sense = ops.crossbar_matrix(g, **DEFAULT).sum()
    exchanged = ops.crossbar_matrix(g.flip(0, 1).T.contiguous(), **{**DEFAULT, "r_wire_row": 10.0, "r_wire_col": 5.0}).sum()
    assert abs(sense - exchanged) < 1e-12 * sense


def test_zero_conductance_cells_rows_and_columns():
    g = tile(12, 10)
    g[3] = 0.0
    g[:, 4] = 0.0
    out = ops.crossbar_matrix(g, **DEFAULT)
    assert (out[3] == 0).all() and (out[:, 4] == 0).all()
    assert relative(out + 1e-30, reference.crossbar_matrix(g, **DEFAULT) + 1e-30) < 1e-11
    assert (ops.crossbar_matrix(torch.zeros(5, 5), **DEFAULT) == 0).all()


@pytest.mark.parametrize("zero", ["r_driver", "r_wire_row", "r_wire_col", "r_sense"])
@pytest.mark.parametrize("rows, columns", [(9, 6), (6, 9)])
def test_each_resistance_may_be_zero(zero, rows, columns):
    g, ohm = tile(rows, columns), {**DEFAULT, zero: 0.0}
    assert relative(ops.crossbar_matrix(g, **ohm), reference.crossbar_matrix(g, **ohm)) < 1e-12


def test_batches_layouts_and_threads_do_not_matter():
    g = tile(10, 12, 2, 3)
    out = ops.crossbar_matrix(g, **DEFAULT)
    assert torch.equal(out[1, 2], ops.crossbar_matrix(g[1, 2], **DEFAULT))
    assert torch.equal(ops.crossbar_matrix(g.mT.contiguous().mT, **DEFAULT), out)
    assert torch.equal(ops.crossbar_matrix(g[:, ::2], **DEFAULT), out[:, ::2])
    big = tile(10, 12, 300)
    one = ops.crossbar_matrix(big, **DEFAULT)
    torch.set_num_threads(2)  # every test starts with one
    assert torch.equal(ops.crossbar_matrix(big, **DEFAULT), one)


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (3, 4, 0), (0, 0)])
def test_empty(shape):
    g = torch.zeros(shape, requires_grad=True)
    out = ops.crossbar_matrix(g, **DEFAULT)
    assert out.shape == shape
    out.sum().backward()
    assert g.grad.shape == shape


# ------------------------------------------------------------------------------------------------- gradient
@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 3), (3, 2), (5, 4), (9, 3)])
def test_gradcheck(rows, columns):
    # Conductances of order one, so that gradcheck's absolute steps make sense; the light and the heavy wires.
    g = tile(rows, columns, 2, low=0.1, high=1.0).requires_grad_()
    light = dict(r_driver=0.3, r_wire_row=0.01, r_wire_col=0.02, r_sense=0.2)
    heavy = dict(r_driver=0.3, r_wire_row=1.0, r_wire_col=2.0, r_sense=0.5)
    for ohm in (light, heavy):
        assert torch.autograd.gradcheck(lambda x, ohm=ohm: ops.crossbar_matrix(x, **ohm), g, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("wire", [10.0, 1e4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 5e-6)])
def test_gradient_equals_autograd_of_the_twin(rows, columns, wire, dtype, tolerance):
    g, ohm = tile(rows, columns, 2, dtype=dtype), {**DEFAULT, "r_wire_col": wire}
    g[0, 0, 0] = 0.0
    weight = torch.randn(g.shape, dtype=torch.float64)
    one, two = g.clone().requires_grad_(), g.double().requires_grad_()
    (ops.crossbar_matrix(one, **ohm) * weight.to(dtype)).sum().backward()
    (reference.crossbar_matrix(two, **ohm) * weight).sum().backward()
    assert (one.grad.double() - two.grad).abs().max() < tolerance * two.grad.abs().max()


@pytest.mark.parametrize("zero", ["r_driver", "r_wire_row", "r_wire_col", "r_sense"])
def test_gradient_with_a_zero_resistance(zero):
    g, ohm = tile(7, 6), {**DEFAULT, zero: 0.0}
    one, two = g.clone().requires_grad_(), g.clone().requires_grad_()
    weight = torch.randn(7, 6, dtype=torch.float64)
    (ops.crossbar_matrix(one, **ohm) * weight).sum().backward()
    (reference.crossbar_matrix(two, **ohm) * weight).sum().backward()
    assert (one.grad - two.grad).abs().max() < 1e-12 * two.grad.abs().max()


def test_gradient_does_not_depend_on_how_much_history_is_kept(monkeypatch):
    module = sys.modules["pyaccel.ops.crossbar_matrix"]  # pyaccel.ops.crossbar_matrix is the function
    g = tile(37, 21)
    weight = torch.randn(37, 21, dtype=torch.float64)

    def gradient():
        leaf = g.clone().requires_grad_()
        (ops.crossbar_matrix(leaf, **DEFAULT) * weight).sum().backward()
        return leaf.grad

    whole = gradient()
    monkeypatch.setattr(module, "HISTORY_BYTES", 1)
    assert torch.equal(gradient(), whole)


def test_no_second_derivative():
    g = tile(3, 3).requires_grad_()
    (grad,) = torch.autograd.grad(ops.crossbar_matrix(g, **DEFAULT).sum(), g, create_graph=True)
    with pytest.raises(NotImplementedError, match="crossbar_matrix_backward cannot be differentiated"):
        grad.sum().backward()


def test_opcheck():
    g = tile(4, 5, 2, dtype=torch.float32).requires_grad_()
    arguments = (g, 1e3, 5.0, 10.0, 1e3)
    torch.library.opcheck(torch.ops.pyaccel.crossbar_matrix.default, arguments)
    torch.library.opcheck(torch.ops.pyaccel.crossbar_matrix_backward.default, (torch.ones(2, 4, 5), g.detach(), *arguments[1:]))


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    g = tile(8, 4, 3).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ops.crossbar_matrix(g, **DEFAULT).sum().backward()
    forward = 3 * 8 * 4 * 12
    assert counter.get_total_flops() == 2 * forward + 3 * 4 * 8 * 8 * 16


# --------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("bad", [-1e-6, float("nan"), float("inf")])
def test_a_bad_conductance_is_named_by_its_place(bad):
    for rows, columns in ((4, 3), (3, 4)):
        g = tile(rows, columns, 5)
        g[2, 1, 2] = bad
        with pytest.raises(ValueError, match=r"finite and at least 0 siemens, got .* in tile 2, row 1, column 2"):
            ops.crossbar_matrix(g, **DEFAULT)


def test_an_ill_conditioned_tile_is_refused():
    g = tile(4, 4, low=1e2, high=1e3)
    with pytest.raises(ValueError, match="tile 0 is too ill-conditioned to solve.*siemens and resistances in ohm"):
        ops.crossbar_matrix(g, r_driver=1.0, r_wire_row=1.0, r_wire_col=1e6, r_sense=1.0)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (dict(conductance=[[1.0]]), TypeError, r"must be a torch.Tensor \[..., M, N\], got a list"),
        (dict(conductance=torch.ones(2, 2, dtype=torch.float16)), TypeError, "float32 or float64.*got torch.float16"),
        (dict(conductance=torch.ones(3)), ValueError, r"must be \[..., M, N\], got \[3\]"),
        (dict(r_sense=-1.0), ValueError, "r_sense must be at least 0 ohm, got -1"),
        (dict(r_driver=float("nan")), ValueError, "r_driver must be a finite number, got nan"),
        (dict(r_wire_row=float("inf")), ValueError, "r_wire_row must be a finite number, got inf"),
        (dict(r_wire_col="5"), TypeError, "r_wire_col must be a number, got str"),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error, match=text):
        ops.crossbar_matrix(**{"conductance": torch.ones(2, 2), **DEFAULT, **arguments})
