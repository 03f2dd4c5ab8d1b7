"""The crossbar kernels on a GPU against the same kernels on the CPU, which the other tests compare with plain torch."""

from __future__ import annotations

import pytest
import torch

from pyaccel import extension, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not extension.has_cuda(), reason="needs a GPU and a build with CUDA kernels"
)
OHM = dict(r_driver=1e3, r_wire_row=5.0, r_wire_col=10.0, r_sense=1e3)


# 100 x 100 and larger do not fit shared memory: the other place of the ladder's state
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 5), (5, 7), (16, 16), (33, 64), (64, 64), (100, 100), (40, 130)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.float64, 1e-11)])
@pytest.mark.parametrize("wire", [10.0, 0.0, 1e4])
def test_small_matrix_and_gradient(rows, columns, dtype, tolerance, wire):
    torch.manual_seed(0)
    g = torch.rand(5, rows, columns, dtype=dtype) * 4.5e-5 + 5e-6
    g[1, rows // 2] = 0.0
    weight = torch.randn_like(g)
    found = []
    for device in ("cpu", "cuda"):
        leaf = g.to(device).requires_grad_()
        out = ops.crossbar_matrix(leaf, **{**OHM, "r_wire_col": wire})
        out.backward(weight.to(device))
        found.append((out.detach().cpu(), leaf.grad.cpu()))
    for cpu, cuda in zip(*found, strict=True):
        assert (cpu - cuda).abs().max() <= tolerance * cpu.abs().max()


def test_more_tiles_than_blocks():
    g = torch.rand(700, 9, 8, device="cuda", dtype=torch.float64) * 4.5e-5
    out = ops.crossbar_matrix(g, **OHM)
    assert torch.equal(out[655], ops.crossbar_matrix(g[655], **OHM))


def test_a_bad_tile_is_nan_and_alone():
    g = torch.full((3, 4, 4), 1e-5, device="cuda")
    g[1, 2, 2] = -1e-6
    out = ops.crossbar_matrix(g, **OHM)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("batch, inputs, outputs, tile", [(1, 1, 1, 1), (7, 20, 9, 8), (70, 130, 65, 64), (3, 33, 129, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("read", ["pair", "apart"])
def test_small_matmul(batch, inputs, outputs, tile, dtype, read):
    torch.manual_seed(0)
    # quarters and a step of 0.3017: partial sums are exact and never on the border of two codes
    x = (torch.randn(batch, inputs, dtype=dtype) * 4).round() / 4
    p, n = ((torch.rand(inputs, outputs, dtype=dtype) * 4).round() / 4 for _ in range(2))
    converters = dict(tile=tile, read=read, adc_bits=6, adc_range=31 * 0.3017)
    cpu = ops.crossbar_matmul(x, p, n, **converters)
    cuda = ops.crossbar_matmul(x.cuda(), p.cuda(), n.cuda(), **converters)
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-5, atol=1e-5)
    noisy = dict(tile=tile, read=read, dac_bits=8, dac_range=2.0, read_noise=0.5, seed=2**40 + 1, stream=3)
    torch.testing.assert_close(
        ops.crossbar_matmul(x.cuda(), p.cuda(), n.cuda(), **noisy).cpu(), ops.crossbar_matmul(x, p, n, **noisy), rtol=1e-4, atol=1e-4
    )


def test_nan_inputs_stay_nan():
    x = torch.ones(2, 4, device="cuda")
    x[1, 1] = float("nan")
    out = ops.crossbar_matmul(x, torch.ones(4, 3, device="cuda"), tile=2, adc_bits=8, adc_range=4.0)
    assert out[1].isnan().all() and not out[0].isnan().any()


def test_captured_in_a_graph():
    g = torch.rand(4, 16, 16, device="cuda") * 4.5e-5
    expected = ops.crossbar_matrix(g, **OHM)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.crossbar_matrix(g, **OHM)
    graph.replay()
    assert torch.equal(out, expected)
