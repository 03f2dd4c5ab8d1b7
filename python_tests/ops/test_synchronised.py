"""`bntt_lif(reduce=...)`: ranks with parts of a batch are one process with the whole of it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from neuron_cases import RESETS, SURROGATES, arrange, label, leaf, pairwise

from pyaccel import ops


class Ranks:
    """Ranks as threads: `reduce` adds up what they bring, each waiting for the others. Records the calls."""

    def __init__(self, count: int):
        self.count, self.barrier, self.brought = count, threading.Barrier(count, timeout=60), {}
        self.calls: list[tuple[torch.Size, torch.dtype]] = []

    def run(self, function) -> list:
        results: list = [None] * self.count

        def work(rank: int) -> None:
            try:
                results[rank] = function(rank, lambda tensor: self._sum(rank, tensor))
            except Exception as error:  # noqa: BLE001  (told below)
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results

    def _sum(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self.brought[rank] = tensor.clone()
        self.barrier.wait()
        total = sum(self.brought[r] for r in range(self.count))
        if rank == 0:
            self.calls.append((tensor.shape, tensor.dtype))
        self.barrier.wait()
        return total


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = pairwise(
    shape=[(4, 6, 3, 2, 5), (7, 5, 4), (1, 4, 2, 3, 3), (3, 9, 130, 1, 1)],
    split=["half", "uneven", "three"],
    layout=["contiguous", "channels_last"],
    reset=RESETS,
    detach=[True, False],
    surrogate=SURROGATES,
    membrane=[True, False],
    leak=["number", "scalar", "channel"],
    threshold=["number", "scalar", "channel"],
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_ranks_with_parts_of_a_batch_are_one_process_with_the_whole(case):
    T, B, C, *pixels = case["shape"]
    x = arrange(0.3 + noise(0, T, B, C, *pixels), case["layout"])
    v, grad, grad_v = noise(1, B, C, *pixels), noise(2, T, B, C, *pixels), noise(3, B, C, *pixels)
    weight = 1 + 0.2 * noise(4, T, C)
    cuts = {"half": [0, B // 2, B], "uneven": [0, 1, B], "three": [0, 1, 3, B]}[case["split"]]

    def value(kind: str, middle: float, seed: int):
        if kind == "number":
            return middle
        size = (C,) if kind == "channel" else ()
        return leaf(middle + 0.05 * noise(seed, *size))

    def run(first: int, last: int, **reduce):
        current, gamma = leaf(x[:, first:last]), leaf(weight.clone())
        membrane = leaf(v[first:last].clone()) if case["membrane"] else None
        leak, threshold = value(case["leak"], 0.9, 5), value(case["threshold"], 0.7, 6)
        spikes, after, mean, var = ops.bntt_lif(
            current, gamma, membrane, leak=leak, threshold=threshold, reset=case["reset"], detach_reset=case["detach"],
            surrogate=case["surrogate"], **reduce,
        )  # fmt: skip
        assert not mean.requires_grad and not var.requires_grad
        torch.autograd.backward([spikes, after], [grad[:, first:last], grad_v[first:last]])
        learned = [gamma.grad, *(p.grad for p in (leak, threshold) if isinstance(p, torch.Tensor))]
        return (
            spikes.detach(),
            after.detach(),
            mean,
            var,
            current.grad,
            None if membrane is None else membrane.grad,
            learned,
        )

    spikes, after, mean, var, grad_x, grad_m, learned = run(0, B)
    ranks = Ranks(len(cuts) - 1)
    parts = ranks.run(lambda rank, reduce: run(cuts[rank], cuts[rank + 1], reduce=reduce))
    assert 0.02 < float(spikes.mean()) < 0.9
    assert torch.equal(torch.cat([p[0] for p in parts], 1), spikes)

    def same(got, wanted, scale=1.0):
        assert (got - wanted).abs().max() <= 1e-10 * max(scale, float(wanted.abs().max()))

    same(torch.cat([p[1] for p in parts]), after)
    for p in parts:
        same(p[2], mean), same(p[3], var)
        assert torch.equal(p[2], parts[0][2]) and torch.equal(p[3], parts[0][3])
    same(torch.cat([p[4] for p in parts], 1), grad_x)
    if grad_m is not None:
        same(torch.cat([p[5] for p in parts]), grad_m)
    for k, wanted in enumerate(learned):  # local sums: DistributedDataParallel adds (or averages) them
        same(sum(p[6][k] for p in parts), wanted)
    assert ranks.calls == [((3, T, C), torch.float64), ((2, T, C), torch.float64)]


def test_without_the_others_statistics_the_ranks_differ():
    """Negative control: with statistics of its own each rank computes something else."""
    x, weight = 0.3 + noise(0, 4, 6, 3, 8), torch.ones(4, 3, dtype=torch.float64)
    whole, *_ = ops.bntt_lif(x, weight)
    apart = torch.cat([ops.bntt_lif(x[:, part], weight)[0] for part in (slice(0, 2), slice(2, 6))], 1)
    assert not torch.equal(whole, apart)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_agree_with_one_process_but_for_rounding(dtype):
    x, grad = (0.3 + noise(0, 5, 8, 4, 6, 6)).to(dtype), noise(1, 5, 8, 4, 6, 6).to(dtype)
    weight = torch.ones(5, 4)

    def run(first, last, **reduce):
        current = leaf(x[:, first:last])
        spikes, _, mean, var = ops.bntt_lif(current, weight, **reduce)
        spikes.backward(grad[:, first:last])
        return spikes.detach(), mean, var, current.grad

    whole = run(0, 8)
    parts = Ranks(2).run(lambda rank, reduce: run(4 * rank, 4 * rank + 4, reduce=reduce))
    torch.testing.assert_close(parts[0][1], whole[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[0][2], whole[2], rtol=1e-5, atol=1e-6)
    spikes = torch.cat([p[0] for p in parts], 1)
    alike = ~(spikes != whole[0]).any(0)  # a potential within a rounding of the threshold may fall to either side
    assert float(alike.float().mean()) > 0.995
    error = (torch.cat([p[3] for p in parts], 1) - whole[3])[:, alike].abs().max()
    assert error <= (2e-3 if dtype == torch.float32 else 2e-2) * whole[3].abs().max()


def test_one_rank_alone_is_the_plain_operator():
    x, weight = leaf(noise(0, 4, 5, 3, 7)), leaf(1 + 0.1 * noise(1, 4, 3))
    results = []
    for options in ({}, dict(reduce=lambda t: t)):
        spikes, after, mean, var = ops.bntt_lif(x, weight, **options)
        results.append(
            (spikes.detach(), after.detach(), mean, var, *torch.autograd.grad(spikes.sum() + after.sum(), (x, weight)))
        )
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_given_statistics_and_inference_need_no_collective():
    def never(tensor):
        raise AssertionError("called")

    x, w = noise(0, 4, 5, 3), torch.ones(4, 3, dtype=torch.float64)
    spikes, *_ = ops.bntt_lif(leaf(x), w, mean=0 * w, var=w, reduce=never)
    spikes.sum().backward()

    calls = []
    with torch.no_grad():
        ops.bntt_lif(x, w, reduce=lambda t: (calls.append(t), t)[1])
    assert len(calls) == 1  # batch statistics are everybody's, gradients or not


def test_a_large_mean_costs_no_digits():
    """The variance is put together from sums of squares, in float64 whatever the dtype."""
    x = (1000 + noise(0, 2, 64, 3, 16)).float()
    _, _, mean, var = ops.bntt_lif(x, torch.ones(2, 3), reduce=lambda t: t)
    wanted = x.double().var((1, 3), correction=0)
    torch.testing.assert_close(var.double(), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((1, 3)), rtol=1e-6, atol=0)


def test_a_constant_channel_has_variance_zero_not_less():
    x = torch.full((3, 4, 2, 5), 0.1)
    spikes, after, _, var = ops.bntt_lif(leaf(x), torch.ones(3, 2), reduce=lambda t: t)
    assert (var >= 0).all() and (var < 1e-9).all() and torch.isfinite(after).all()


def test_double_backward_is_refused():
    x, w = leaf(noise(0, 3, 4, 2)), torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="once_differentiable|trying to differentiate twice"):
        (g,) = torch.autograd.grad(ops.bntt_lif(x, w, reduce=lambda t: t)[0].square().sum(), x, create_graph=True)
        g.sum().backward()


def test_no_steps():
    spikes, v, mean, _ = ops.bntt_lif(torch.zeros(0, 2, 3), torch.ones(0, 3), reduce=lambda t: t)
    assert spikes.shape == (0, 2, 3) and (v == 0).all() and mean.shape == (0, 3)


def test_a_rank_without_images_does_not_spoil_the_others():
    x, w = noise(0, 4, 6, 3), torch.ones(4, 3, dtype=torch.float64)
    whole, *_ = ops.bntt_lif(x, w)
    parts = Ranks(2).run(lambda rank, reduce: ops.bntt_lif(x[:, : 6 * (1 - rank)], w, reduce=reduce)[0])
    assert torch.equal(parts[0], whole)


statistics = torch.ops.pyaccel.bntt_statistics.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 1, 1), (1, 7, 129), (2, 3, 4, 5, 7), (2, 3, 130, 1, 1)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "time_inside"])
def test_statistics_are_mean_and_biased_variance(shape, layout, dtype):
    x = arrange((1 + noise(0, *shape)).to(dtype), layout)
    mean, var = ops.bntt_statistics(leaf(x))
    state = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == var.dtype == state and not mean.requires_grad
    over = [1, *range(3, x.dim())]
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(mean.double(), x.double().mean(over), rtol=rtol, atol=rtol)
    torch.testing.assert_close(var.double(), x.double().var(over, correction=0), rtol=rtol, atol=rtol)


def test_opcheck_statistics():
    for x in (noise(0, 3, 4, 5), arrange(noise(0, 2, 3, 4, 5, 7).float(), "channels_last"), noise(0, 0, 2, 3)):
        torch.library.opcheck(statistics, (x,))


def test_statistics_of_nothing_and_of_no_tensor():
    assert ops.bntt_statistics(torch.zeros(0, 2, 3))[0].shape == (0, 3)
    assert all(s.shape == (4, 3) and s.isnan().all() for s in ops.bntt_statistics(torch.zeros(4, 0, 3)))
    with pytest.raises(ValueError, match=r"bntt_statistics: current must be \[T, B, C, ...\], got \[3, 2\]"):
        ops.bntt_statistics(torch.zeros(3, 2))


FALLBACK = """
import sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "pyaccel._C":
            raise ImportError("blocked for the test")

sys.meta_path.insert(0, Blocked())
warnings.simplefilter("ignore")
import torch
from pyaccel import extension, ops

assert extension._C is None
x, w = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True), torch.ones(3, 2, dtype=torch.float64)
mean, var = ops.bntt_statistics(x)
assert torch.allclose(mean, x.mean((1, 3))) and torch.allclose(var, x.var((1, 3), correction=0))
spikes, *_ = ops.bntt_lif(x, w, reduce=lambda t: t)
assert torch.equal(spikes, ops.bntt_lif(x, w)[0])
try:
    spikes.sum().backward()
except NotImplementedError as error:
    print(error)
"""


def test_without_the_compiled_module_backward_says_what_is_missing(run_python):
    done = run_python(FALLBACK)
    assert done.returncode == 0, done.stderr
    assert "bntt_lif: statistics over several processes need the compiled kernels" in done.stdout


GLOO = """
import sys
import torch
import torch.distributed as dist
from pyaccel import ops

torch.set_num_threads(1)
rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)

def reduce(tensor):
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor

g = torch.Generator().manual_seed(0)
x, grad = (torch.randn(4, 6, 3, 5, 5, generator=g, dtype=torch.float64) for _ in range(2))
part = slice(0, 2) if rank == 0 else slice(2, 6)
current, weight = x[:, part].clone().requires_grad_(), torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
spikes, v, mean, var = ops.bntt_lif(current, weight, reduce=reduce)
spikes.backward(grad[:, part])
torch.save(dict(spikes=spikes.detach(), v=v.detach(), mean=mean, var=var, gx=current.grad, gw=weight.grad), f"{out}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_gloo_processes_are_one(tmp_path):
    command = [sys.executable, "-c", GLOO]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(tmp_path)], stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 6, 3, 5, 5, generator=g, dtype=torch.float64) for _ in range(2))
    current, weight = leaf(x), torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    spikes, v, mean, var = ops.bntt_lif(current, weight)
    spikes.backward(grad)
    assert torch.equal(torch.cat([p["spikes"] for p in parts], 1), spikes)
    for got, wanted in (
        (torch.cat([p["v"] for p in parts]), v), (parts[0]["mean"], mean), (parts[1]["var"], var),
        (torch.cat([p["gx"] for p in parts], 1), current.grad), (sum(p["gw"] for p in parts), weight.grad),
    ):  # fmt: skip
        assert (got - wanted).abs().max() <= 1e-10 * max(1.0, float(wanted.detach().abs().max()))
