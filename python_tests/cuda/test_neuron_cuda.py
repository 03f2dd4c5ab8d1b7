"""The neuron kernels on a GPU against the same kernels on the CPU, which the other tests compare with plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from pyaccel import extension, ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not extension.has_cuda(), reason="needs a GPU and a build with CUDA kernels"
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SMALL = [(3, 2, 5, 3, 3), (25, 3, 8, 4, 4), (33, 129), (70, 2, 7)]  # compute-sanitizer runs these (-k small)


def state_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def both(function, *tensors, **options):
    """Outputs and gradients of `function(*tensors, **options)` on the CPU and on the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        leaves = [None if t is None else t.to(device).detach().requires_grad_(t.is_floating_point()) for t in tensors]
        out = [o for o in function(*leaves, **options) if o.is_floating_point()]
        generator = torch.Generator().manual_seed(1)
        tracked = [(o, torch.randn(o.shape, generator=generator).to(o.dtype).to(device)) for o in out if o.requires_grad]
        torch.autograd.backward([o for o, _ in tracked], [g for _, g in tracked])
        found.append(([o.detach().cpu() for o in out], [None if t is None else t.grad for t in leaves]))
    (cpu, cpu_grads), (cuda, cuda_grads) = found
    return cpu, cuda, [(a, b.cpu()) for a, b in zip(cpu_grads, cuda_grads, strict=True) if a is not None]


def close(pairs, dtype):
    for cpu, cuda in pairs:
        scale = cpu.abs().max().clamp_min(1e-6)
        assert ((cpu - cuda).abs().max() / scale) <= TOLERANCE[dtype], (cpu.shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("delay", [False, True])
def test_small_lif(shape, dtype, delay):
    torch.manual_seed(0)
    x, v = torch.randn(shape).to(dtype), torch.randn(shape[1:], dtype=state_of(dtype))
    surrogates = ("triangle", "rectangle", "atan", "sigmoid", "fast_sigmoid")
    for surrogate, reset, detach in itertools.product(surrogates, ("soft", "hard", "none"), (True, False)):
        options = dict(leak=0.9, threshold=0.8, surrogate=surrogate, reset=reset, detach_reset=detach, delay=delay)
        cpu, cuda, grads = both(ops.lif, x, v, **options)
        assert all(torch.equal(a, b) for a, b in zip(cpu, cuda, strict=True)), options
        close(grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_learnable(dtype):
    torch.manual_seed(0)
    x = torch.randn(9, 3, 6, 4, 4).to(dtype)
    leak, threshold = torch.rand(6, dtype=state_of(dtype)) * 0.2 + 0.7, torch.rand(6, dtype=state_of(dtype)) + 0.5

    def run(x, leak, threshold):
        return ops.lif(x, leak=leak, threshold=threshold, detach_reset=False)

    cpu, cuda, grads = both(run, x, leak, threshold)
    assert torch.equal(cpu[0], cuda[0])
    close(grads, dtype)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 6, 8, 5, 5), (3, 16, 32, 16, 16), (40, 4, 7, 2, 2), (5, 32, 24)], ids=str)
def test_small_bntt(shape, last):
    if last and len(shape) < 5:
        pytest.skip("images only")
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if last:
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    weight = torch.rand(shape[0], shape[2], dtype=torch.float64) + 0.5
    cpu, cuda, grads = both(ops.bntt_lif, x, weight)  # float64: no neuron lies close enough to its threshold to flip
    assert torch.equal(cpu[0], cuda[0])
    close(grads, torch.float64)
    given = dict(mean=torch.randn(weight.shape, dtype=torch.float64), var=torch.rand(weight.shape, dtype=torch.float64))

    def run(x, weight):
        return ops.bntt_lif(x, weight, **{k: t.to(x.device) for k, t in given.items()})

    cpu, cuda, grads = both(run, x, weight)
    assert torch.equal(cpu[0], cuda[0])
    close(grads, torch.float64)


def test_small_encoder_is_bit_identical():
    torch.manual_seed(0)
    for image in (torch.randn(5, 3, 7, 9), torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last), torch.rand(3, 10)):
        for dtype in DTYPES:
            options = dict(gain=0.5, seed=2**40 + 7, stream=3, first_step=2)
            cpu = ops.poisson_encode(image.to(dtype), 6, **options)
            assert torch.equal(cpu, ops.poisson_encode(image.to(dtype).cuda(), 6, **options).cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_stdb_and_packing(dtype):
    torch.manual_seed(0)
    for shape, form in itertools.product(SMALL, ("exact", "fp32_underflow")):
        x, v = torch.randn(shape).to(dtype), torch.randn(shape[1:], dtype=state_of(dtype))

        def run(x, v, form=form):
            return ops.stdb_lif(x, v, leak=0.95, threshold=0.8, form=form)

        cpu, cuda, grads = both(run, x, v)
        assert all(torch.equal(a, b) for a, b in zip(cpu, cuda, strict=True))
        close(grads, dtype)
        packed = ops.pack_spikes(cpu[0].to(dtype))
        assert torch.equal(packed, ops.pack_spikes(cuda[0].to(dtype).cuda()).cpu())
        assert torch.equal(ops.unpack_spikes(packed.cuda(), shape, dtype).cpu(), cpu[0].to(dtype))
        assert torch.equal(ops.lif(x.cuda(), packed=True)[0].cpu(), ops.lif(x, packed=True)[0])


@pytest.mark.parametrize("kind, values", [("signed", (-1, 0, 1)), ("pooled", (0, 0.25, 1)), ("pooled_signed", (-0.75, 0, 1))])
def test_small_spike_layers(kind, values):
    torch.manual_seed(0)
    spikes = torch.tensor(values, dtype=torch.float64)[torch.randint(3, (2, 3, 4, 6, 6))]
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    cpu, cuda, grads = both(lambda s, w: (ops.spike_conv2d(s, w, padding=1, kind=kind),), spikes, weight)
    close([*zip(cpu, cuda, strict=True), *grads], torch.float64)


def test_streams_and_graph_capture():
    x = torch.randn(25, 64, 128, device="cuda")
    wanted = ops.lif(x, leak=0.9)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ops.bntt_lif(x, torch.ones(25, 128, device="cuda"))
        found = ops.lif(x, leak=0.9)[0]
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.lif(x, leak=0.9)[0]
    x.copy_(-x)
    graph.replay()
    assert torch.equal(captured, ops.lif(x, leak=0.9)[0])


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(520, 2**22, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 2
    spikes, _ = ops.lif(x)
    assert spikes[-1, -1] == 1 and spikes.sum(dtype=torch.float32) == 1


def test_a_refused_launch_is_an_exception():
    with pytest.raises((RuntimeError, ValueError)):
        ops.lif(torch.empty(1, 2**32, dtype=torch.bfloat16, device="cuda").expand(1, 2**32))
