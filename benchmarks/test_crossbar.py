"""The crossbar family against its own roofline, a sparse LU of the nodal equations, badcrossbar if installed, GEMM.

The roofline of the effective matrix is its multiply-adds, M N (N + M) / 2 with M >= N, at the rate of torch's matrix
product of the same dtype in the same run. Peers get 64 right sides, as they would for a batch of 64 inputs; the
effective matrix serves any batch. "ms a tile on 2 threads" is CPU time halved: tiles are independent, and wall time on
a shared machine says little.
"""

from __future__ import annotations

import pytest
import torch
from timing import measure

from pyaccel import nn, ops, reference
from pyaccel.hardware import CrossbarConfig

pytestmark = pytest.mark.benchmark
OHM = dict(r_driver=1e3, r_wire_row=5.0, r_wire_col=10.0, r_sense=1e3)
GOAL = {(64, torch.float32): 0.4, (64, torch.float64): 0.6}  # ms a tile on two threads


def tiles(count: int, size: int, dtype: torch.dtype, device="cpu") -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(count, size, size, dtype=dtype, device=device) * 4.5e-5 + 5e-6


def check(g: torch.Tensor) -> None:
    exact = reference.crossbar_matrix(g[:1].double().cpu(), **OHM)
    error = (ops.crossbar_matrix(g[:1], **OHM).double().cpu() / exact - 1).abs().max()
    single = 5e-6 if g.shape[-1] <= 128 else 1e-5  # promised up to 128 rows; the error grows with their number
    assert error < (single if g.dtype == torch.float32 else 1e-11)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_matrix(size, dtype, device, quick, table, benchmark):
    count = max(1, min(1024, 64 * 64**3 // size**3))
    g = tiles(count, size, dtype, device)
    check(g)
    leaf, weight, square = g.clone().requires_grad_(), torch.randn_like(g), torch.randn(512, 512, dtype=dtype, device=device)

    def backward():
        leaf.grad = None
        effective.backward(weight, retain_graph=True)

    effective = ops.crossbar_matrix(leaf, **OHM)
    jobs = {
        "forward": lambda: ops.crossbar_matrix(g, **OHM),
        "backward": backward,
        "gemm": lambda: square @ square,
    }
    t = measure(jobs, 2 if quick else 5, device)
    rate = 512**3 / t["gemm"].cpu
    forward = t["forward"].cpu / count
    table.append(
        {
            "tile": f"{size}x{size}",
            "dtype": name(dtype),
            "tiles": count,
            "forward ms (CPU) a tile": forward * 1e3,
            "ms a tile on 2 threads": forward * 1e3 / 2,
            "goal": GOAL.get((size, dtype)),
            "r forward": forward * rate / size**4,
            "backward / forward": t["backward"].cpu / t["forward"].cpu,
            "VGG16 (7,200 tiles) s on 2 threads": forward * 3600 if size == 64 else None,
        }
    )
    benchmark.pedantic(jobs["forward"], rounds=2, iterations=1)


def peers(g, volts) -> dict:
    """Other programs, where they are installed: name -> (currents [inputs, columns] of one tile, their accuracy)."""
    found = {}
    try:
        import badcrossbar
    except ImportError:
        pass
    else:
        found["badcrossbar (no terminals)"] = (
            lambda: badcrossbar.compute(
                volts.T, 1 / g, r_i_word_line=5, r_i_bit_line=10, node_voltages=False, all_currents=False
            ).currents.output,
            1e-10,
        )
    try:
        from simulator import CrossSimParameters
        from simulator.backend import ComputeBackend
        from simulator.circuits.array.NonInterleaved_InputSource import NoninterleavedInputSourceArray
        from simulator.parameters.core_parameters import CoreStyle
    except ImportError:
        return found
    ComputeBackend(use_gpu=False)
    parameters = CrossSimParameters()
    parameters.core.style = CoreStyle.OFFSET
    parameters.xbar.device.Rmin, parameters.xbar.device.Rmax = 20e3, 200e3
    parasitics = parameters.xbar.array.parasitics
    parasitics.enable, parasitics.Rp_row, parasitics.Rp_col = True, 5.0, 10.0
    solver = NoninterleavedInputSourceArray(parameters)  # to 1e-3 of the input range, its default
    found["CrossSim (no terminals, to 1e-3)"] = (
        lambda: (solver.iterative_solve(vector=volts.T, matrix=g.T * 20e3) / 20e3).T, 1e-2
    )  # fmt: skip
    return found


def test_peers(quick, table, benchmark):
    """One 64x64 tile and 64 inputs: what a program that solves for its inputs pays, beside the tile's whole matrix."""
    np, sparse, linalg = (pytest.importorskip(m) for m in ("numpy", "scipy.sparse", "scipy.sparse.linalg"))
    g = tiles(64, 64, torch.float64)
    check(g)
    rows = columns = 64
    u = np.arange(rows * columns).reshape(rows, columns)
    w, one = u + rows * columns, g[0].numpy()
    volts = np.random.default_rng(0).random((64, 64))

    def lu():
        first, second, value = [], [], []
        for a, b, c in ((u, w, one), (u[:, 1:], u[:, :-1], 1 / 5.0), (w[1:], w[:-1], 1 / 10.0)):
            c = np.broadcast_to(c, a.shape).ravel()
            a, b = a.ravel(), b.ravel()
            first += [a, b, a, b]
            second += [a, b, b, a]
            value += [c, c, -c, -c]
        first += [u[:, 0], w[-1]]
        second += [u[:, 0], w[-1]]
        value += [np.full(rows, 1e-3), np.full(columns, 1e-3)]
        n = 2 * u.size
        a = sparse.csc_matrix((np.concatenate(value), (np.concatenate(first), np.concatenate(second))), (n, n))
        b = np.zeros((n, 64))
        b[u[:, 0]] = volts.T * 1e-3
        return (linalg.splu(a, permc_spec="MMD_AT_PLUS_A").solve(b)[w[-1]] * 1e-3).T

    expected = volts @ ops.crossbar_matrix(g[0], **OHM).numpy()
    assert np.abs(lu() / expected - 1).max() < 1e-10
    jobs = {
        "ours float32": lambda f=g.float(): ops.crossbar_matrix(f, **OHM),
        "ours float64": lambda: ops.crossbar_matrix(g, **OHM),
        "sparse LU": lu,
    }
    segments = {**OHM, "r_driver": 5.0, "r_sense": 10.0}  # the circuit of both: no terminals, a segment at either end
    alike = volts @ ops.crossbar_matrix(g[0], **segments).numpy()
    for what, (solve, tolerance) in peers(one, volts).items():
        assert np.abs(solve() / alike - 1).max() < tolerance, what
        jobs[what] = solve
    t = measure(jobs, 2 if quick else 5, torch.device("cpu"))
    each = {what: found.cpu / (64 if what.startswith("ours") else 1) for what, found in t.items()}
    for what, seconds in each.items():
        table.append({"what": what, "ms (CPU) a tile": seconds * 1e3, "over ours float32": seconds / each["ours float32"]})
    benchmark.pedantic(jobs["ours float32"], rounds=2, iterations=1)


def test_matmul(device, quick, table, benchmark):
    """512 x 512, batch 64, tiles of 64 rows: float32 GEMM is the yardstick (goal 2)."""
    torch.manual_seed(0)
    x, p, n = torch.randn(64, 512, device=device), torch.rand(512, 512, device=device), torch.rand(512, 512, device=device)
    difference = p - n
    options = dict(tile=64, dac_bits=8, dac_range=4.0, adc_bits=8, adc_range=20.0)
    out, twin = ops.crossbar_matmul(x, p, n, **options), reference.crossbar_matmul(x, p, n, **options)
    assert ((out - twin).abs() > 1e-3).double().mean() < 1e-3  # codes at a boundary
    jobs = {
        "GEMM": lambda: x @ difference,
        "one array, DAC and ADC": lambda: ops.crossbar_matmul(x, difference, **options),
        "pair, DAC and ADC": lambda: ops.crossbar_matmul(x, p, n, **options),
        "apart, DAC and ADC": lambda: ops.crossbar_matmul(x, p, n, read="apart", **options),
        "pair, DAC, ADC and read noise": lambda: ops.crossbar_matmul(x, p, n, read_noise=0.1, **options),
        "plain torch": lambda: reference.crossbar_matmul(x, p, n, **options),
    }
    t = measure(jobs, 3 if quick else 31, device)
    for what, found in t.items():
        table.append({"what": what, "ms (CPU)": found.cpu * 1e3, "over GEMM": found.cpu / t["GEMM"].cpu})
    benchmark.pedantic(jobs["pair, DAC and ADC"], rounds=3, iterations=3)


def test_layers(device, quick, table, benchmark):
    """A mapped layer without converters against the layer it replaces (goal 1.2), mapping already done."""
    config = CrossbarConfig()
    torch.manual_seed(0)
    linear, convolution = torch.nn.Linear(512, 512, device=device), torch.nn.Conv2d(64, 64, 3, padding=1, device=device)
    analog = nn.AnalogLinear(512, 512, config=config, device=device)
    analog_convolution = nn.AnalogConv2d(64, 64, 3, padding=1, config=config, device=device)
    x, image = torch.randn(64, 512, device=device), torch.randn(8, 64, 32, 32, device=device)
    torch.testing.assert_close(
        analog(x), torch.nn.functional.linear(x, analog.effective_weight(), analog.bias), rtol=1e-5, atol=1e-5
    )
    jobs = {
        "Linear": lambda: linear(x), "AnalogLinear": lambda: analog(x),
        "Conv2d": lambda: convolution(image), "AnalogConv2d": lambda: analog_convolution(image),
    }  # fmt: skip
    with torch.no_grad():
        t = measure(jobs, 3 if quick else 31, device)
        for what, plain in (("AnalogLinear", "Linear"), ("AnalogConv2d", "Conv2d")):
            table.append({"what": what, "ms (CPU)": t[what].cpu * 1e3, "over torch": t[what].cpu / t[plain].cpu})
        benchmark.pedantic(jobs["AnalogLinear"], rounds=3, iterations=3)
