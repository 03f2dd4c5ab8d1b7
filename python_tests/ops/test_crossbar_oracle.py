"""`crossbar_matrix` against a sparse LU of the nodal equations, one unknown a node, written down from Kirchhoff's law
alone."""

from __future__ import annotations

import pytest
import torch

from pyaccel import ops

np = pytest.importorskip("numpy")
sparse = pytest.importorskip("scipy.sparse")
linalg = pytest.importorskip("scipy.sparse.linalg")


def voltages(g, r_driver, r_wire_row, r_wire_col, r_sense):
    """Node voltages [rows, columns, inputs] of row and column nodes for one volt at each input in turn, float64 (all
    resistances above 0), with one step of iterative refinement."""
    rows, columns = g.shape
    u = np.arange(rows * columns).reshape(rows, columns)
    w = u + rows * columns
    first, second, value = [], [], []

    def resistor(a, b, conductance):
        a, b = np.ravel(a), np.ravel(b)
        conductance = np.broadcast_to(conductance, a.shape).ravel()
        first.extend((a, b, a, b)), second.extend((a, b, b, a))
        value.extend((conductance, conductance, -conductance, -conductance))

    def to_ground(a, conductance):
        first.append(a), second.append(a), value.append(np.full(a.shape, conductance))

    resistor(u, w, g.ravel())
    resistor(u[:, 1:], u[:, :-1], 1 / r_wire_row)
    resistor(w[1:], w[:-1], 1 / r_wire_col)
    to_ground(u[:, 0], 1 / r_driver)
    to_ground(w[-1], 1 / r_sense)
    n = 2 * rows * columns
    a = sparse.csc_matrix((np.concatenate(value), (np.concatenate(first), np.concatenate(second))), (n, n))
    b = np.zeros((n, rows))
    b[u[:, 0], np.arange(rows)] = 1 / r_driver
    lu = linalg.splu(a, permc_spec="MMD_AT_PLUS_A")
    x = lu.solve(b)
    x += lu.solve(b - a @ x)
    return x[u], x[w]


def nodal(g, r_driver, r_wire_row, r_wire_col, r_sense):
    """Effective conductance in float64."""
    _, w = voltages(g, r_driver, r_wire_row, r_wire_col, r_sense)
    return (w[-1] / r_sense).T


def accuracy(out, exact):
    """Largest relative error of entries above 1e-3 of the largest, and largest error over the largest entry."""
    error, large = np.abs(out - exact), exact > 1e-3 * exact.max()
    return (error[large] / exact[large]).max(), error.max() / exact.max()


def tile(rows, columns, low, high, seed):
    """Log-uniform cells, rounded to float32, so that both precisions solve the same network."""
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(np.log(low), np.log(high), (rows, columns))).astype(np.float32)


CASES = [
    (5e-6, 5e-5, 1e3, 5, 10, 1e3),
    (5e-5, 5e-5, 1e3, 5, 10, 1e3),
    (1e-4, 1e-3, 10, 1, 1, 10),
    (5e-8, 5e-5, 1e3, 5, 10, 1e3),
    (5e-6, 5e-5, 1e3, 100, 200, 1e3),
    (1e-6, 1e-3, 100, 100, 100, 100),
    (1e-5, 1e-2, 1e3, 1e3, 1e3, 1e3),
    (1e-9, 1e-6, 1, 1, 1, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(f"{v:g}" for v in c))
@pytest.mark.parametrize("rows, columns", [(32, 32), (24, 40), (41, 17)])
def test_against_sparse_lu(case, rows, columns):
    low, high, *ohm = case
    g = tile(rows, columns, low, high, 1)
    names = dict(zip(("r_driver", "r_wire_row", "r_wire_col", "r_sense"), map(float, ohm), strict=True))
    exact = nodal(g.astype(np.float64), **names)
    double = ops.crossbar_matrix(torch.from_numpy(g).double(), **names).numpy()
    single = ops.crossbar_matrix(torch.from_numpy(g), **names).numpy()
    assert max(accuracy(double, exact)) < 1e-11
    relative, absolute = accuracy(single, exact)
    assert relative < 5e-6 and absolute < 1e-6


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 9), (9, 1), (2, 2), (5, 3), (64, 64), (48, 80)])
def test_sizes_against_sparse_lu(rows, columns):
    low, high, *ohm = CASES[0]
    names = dict(zip(("r_driver", "r_wire_row", "r_wire_col", "r_sense"), map(float, ohm), strict=True))
    g = tile(rows, columns, low, high, rows)
    exact = nodal(g.astype(np.float64), **names)
    assert max(accuracy(ops.crossbar_matrix(torch.from_numpy(g).double(), **names).numpy(), exact)) < 1e-11
    relative, absolute = accuracy(ops.crossbar_matrix(torch.from_numpy(g), **names).numpy(), exact)
    assert relative < 5e-6 and absolute < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("rows, columns", [(128, 96), (96, 128), (128, 128)])
def test_large_tiles_against_sparse_lu(rows, columns):
    test_sizes_against_sparse_lu(rows, columns)


def extended(g, r_driver, r_wire_row, r_wire_col, r_sense):
    """The same equations by dense elimination in extended precision: where the LU itself loses digits."""
    real = np.longdouble
    rows, columns = g.shape
    u = np.arange(rows * columns).reshape(rows, columns)
    w = u + rows * columns
    a, b = np.zeros((2 * u.size, 2 * u.size), real), np.zeros((2 * u.size, rows), real)

    def resistor(p, q, conductance):
        a[p, p] += conductance
        a[q, q] += conductance
        a[p, q] -= conductance
        a[q, p] -= conductance

    for i, j in np.ndindex(rows, columns):
        resistor(u[i, j], w[i, j], real(g[i, j]))
        if j:
            resistor(u[i, j], u[i, j - 1], 1 / real(r_wire_row))
        if i:
            resistor(w[i, j], w[i - 1, j], 1 / real(r_wire_col))
    a[u[:, 0], u[:, 0]] += 1 / real(r_driver)
    a[w[-1], w[-1]] += 1 / real(r_sense)
    b[u[:, 0], np.arange(rows)] = 1 / real(r_driver)
    for p in range(len(a)):
        factor = a[p + 1 :, p] / a[p, p]
        a[p + 1 :] -= factor[:, None] * a[p]
        b[p + 1 :] -= factor[:, None] * b[p]
    for p in range(len(a) - 1, -1, -1):
        b[p] = (b[p] - a[p, p + 1 :] @ b[p + 1 :]) / a[p, p]
    return (b[w[-1]] / real(r_sense)).T.astype(np.float64)


EXTREME = [(5e-6, 5e-5, 1e6, 0.1, 0.1, 1e5), (1e-3, 1, 1e5, 0.1, 1, 1e5), (1, 10, 1, 100, 1e4, 1), (1e-9, 1e-3, 1e5, 1, 1, 1)]


@pytest.mark.parametrize("case", EXTREME, ids=lambda c: "-".join(f"{v:g}" for v in c))
def test_six_decades_of_resistances(case):
    low, high, *ohm = case
    names = dict(zip(("r_driver", "r_wire_row", "r_wire_col", "r_sense"), map(float, ohm), strict=True))
    g = tile(9, 7, low, high, 2)
    exact = extended(g.astype(np.float64), **names)
    assert max(accuracy(ops.crossbar_matrix(torch.from_numpy(g).double(), **names).numpy(), exact)) < 1e-11
    relative, absolute = accuracy(ops.crossbar_matrix(torch.from_numpy(g), **names).numpy(), exact)
    assert relative < 5e-6 and absolute < 1e-6


def test_the_oracle_sees_a_wrong_wire():
    low, high, *ohm = CASES[0]
    g = tile(16, 16, low, high, 3)
    exact = nodal(g.astype(np.float64), *ohm)
    wrong = ops.crossbar_matrix(torch.from_numpy(g).double(), r_driver=1e3, r_wire_row=5.0, r_wire_col=10.01, r_sense=1e3)
    assert max(accuracy(wrong.numpy(), exact)) > 1e-6


def test_what_the_drivers_give_is_what_the_columns_carry():
    """Current conservation: driver currents come from the oracle's row nodes, column currents from the operator."""
    low, high, *ohm = CASES[0]
    g = tile(18, 11, low, high, 7).astype(np.float64)
    names = dict(zip(("r_driver", "r_wire_row", "r_wire_col", "r_sense"), map(float, ohm), strict=True))
    u, _ = voltages(g, **names)
    given = ((np.eye(18) - u[:, 0]) / names["r_driver"]).sum(0)  # of all drivers, for each input in turn
    carried = ops.crossbar_matrix(torch.from_numpy(g), **names).numpy().sum(1)
    np.testing.assert_allclose(carried, given, rtol=1e-11)


def test_linearity_and_signed_voltages():
    """The product with G' is the network's answer to any voltages, negative ones included (superposition)."""
    low, high, *ohm = CASES[0]
    g = tile(20, 12, low, high, 4).astype(np.float64)
    volts = np.random.default_rng(0).standard_normal((5, 20))
    names = dict(zip(("r_driver", "r_wire_row", "r_wire_col", "r_sense"), map(float, ohm), strict=True))
    out = torch.from_numpy(volts) @ ops.crossbar_matrix(torch.from_numpy(g), **names)
    expected = volts @ nodal(g, *ohm)
    assert np.abs(out.numpy() - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("rows, columns", [(4, 3), (16, 8), (24, 33)])
def test_against_badcrossbar(rows, columns):
    """An independent program (no terminal resistances: one wire segment before the first and behind the last cell)."""
    badcrossbar = pytest.importorskip("badcrossbar")
    g = tile(rows, columns, 5e-6, 5e-5, 5).astype(np.float64)
    volts = np.random.default_rng(1).random((rows, 3))
    theirs = badcrossbar.compute(
        volts, 1 / g, r_i_word_line=5, r_i_bit_line=10, node_voltages=False, all_currents=False
    ).currents.output
    ours = torch.from_numpy(volts.T) @ ops.crossbar_matrix(
        torch.from_numpy(g), r_driver=5.0, r_wire_row=5.0, r_wire_col=10.0, r_sense=10.0
    )
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-11)


@pytest.mark.parametrize("rows, columns", [(16, 12), (24, 33)])
@pytest.mark.parametrize("sense", [0.0, 200.0])
def test_against_crosssim(rows, columns, sense):
    """Another independent program, which iterates on cell voltages (here to 1e-9 of the input range). Its circuit has a
    wire segment before the first and behind the last cell, and a resistance at the sense amplifier. (That of its
    driver is left out: version 3.2 adds it to every segment of the first row.)"""
    arrays = pytest.importorskip("simulator.circuits.array.NonInterleaved_InputSource")
    from simulator import CrossSimParameters
    from simulator.backend import ComputeBackend
    from simulator.parameters.core_parameters import CoreStyle

    ComputeBackend(use_gpu=False)
    parameters = CrossSimParameters()
    parameters.core.style = CoreStyle.OFFSET
    parameters.xbar.device.Rmin, parameters.xbar.device.Rmax = 20e3, 200e3
    parasitics = parameters.xbar.array.parasitics
    parasitics.enable, parasitics.Rp_row, parasitics.Rp_col, parasitics.Rp_col_terminal = True, 5.0, 10.0, sense
    parameters.simulation.Verr_th_mvm, parameters.simulation.Niters_max_parasitics = 1e-9, 10_000
    g = tile(rows, columns, 5e-6, 5e-5, 6).astype(np.float64)
    volts = np.random.default_rng(2).random(rows)
    solver = arrays.NoninterleavedInputSourceArray(parameters)
    theirs = solver.iterative_solve(vector=volts, matrix=g.T * 20e3) / 20e3
    ohm = dict(r_driver=5.0, r_wire_row=5.0, r_wire_col=10.0)
    ours = torch.from_numpy(volts) @ ops.crossbar_matrix(torch.from_numpy(g), **ohm, r_sense=10.0 + sense)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-7)
    other = torch.from_numpy(volts) @ ops.crossbar_matrix(torch.from_numpy(g), **ohm, r_sense=11.0 + sense)
    assert np.abs(other.numpy() / theirs - 1).max() > 1e-5  # one ohm shows
