"""`nn.NoisyMemory` and `surgery.with_noisy_memory`: fresh draws, one chip, state, copies, and coming off again."""

from __future__ import annotations

import copy
import zlib

import pytest
import torch
from torch import nn

from pyaccel import ops, surgery
from pyaccel.hardware import SramConfig
from pyaccel.nn import NoisyMemory, StoredOutput, set_memory_pass, without_failures
from pyaccel.surgery.memory import noisy_sites

BANK = SramConfig(8, n8t=4, p6=0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    ).eval()


def images(n: int = 5) -> torch.Tensor:
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def noisy_network(**options) -> nn.Module:
    sites = {"0/weight": BANK, "2/activation": BANK, "4/weight": SramConfig(4, n8t=1, p6=0.05)}
    return surgery.with_noisy_memory(network(), sites, calibration=[images()], **options)


def test_a_chip_does_not_change_and_a_read_does():
    x = torch.randn(1000)
    chip = NoisyMemory(BANK, 0.02, signed=True, redraw=False, seed=3, stream=4)
    assert torch.equal(chip(x), chip(x))
    assert torch.equal(chip(x), ops.sram_noise(x, 0.02, BANK.probabilities, signed=True, seed=3, stream=4))
    read = NoisyMemory(BANK, 0.02, signed=True, redraw=True, seed=3, stream=4)
    first, second = read(x), read(x)
    assert torch.equal(first, chip(x)) and not torch.equal(first, second)
    read.set_pass(0)
    assert torch.equal(read(x), first)
    assert int(read.passes) == 1


def test_streams_wrap_at_32_bits():
    read = NoisyMemory(BANK, 0.02, signed=True, redraw=True, stream=0xFFFFFFFF)
    read.set_pass(1)
    x = torch.randn(100)
    assert torch.equal(read(x), ops.sram_noise(x, 0.02, BANK.probabilities, signed=True, seed=0, stream=0))


def test_without_failures_only_quantises():
    model = noisy_network()
    with without_failures(model):
        a, b = model(images()), model(images())
    assert torch.equal(a, b)
    assert not torch.equal(model(images()), model(images()))
    assert all(m.active for m in model.modules() if isinstance(m, NoisyMemory))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(config=SramConfig(n8t=4, semantics="stuck"), scale=1.0), "semantics must be flip"),
        (dict(config=BANK, scale=0.0), "scale must be positive, got 0.0"),
    ],
)
def test_wrong_memories(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoisyMemory(**arguments, signed=True, redraw=False)


def test_sites_scales_and_streams():
    plain = network()
    model = noisy_network(seed=9)
    memory = model[0].parametrizations.weight[0]
    assert memory.scale == pytest.approx(float(plain[0].weight.detach().abs().max()) / 127)
    assert memory.key.tolist() == [9, zlib.crc32(b"0/weight"), 0]
    expected = ops.sram_noise(
        plain[0].weight.detach(), memory.scale, BANK.probabilities, signed=True, seed=9, stream=zlib.crc32(b"0/weight")
    )
    assert torch.equal(model[0].weight, expected)
    stored = model[2]
    assert isinstance(stored, StoredOutput) and not stored.memory.signed
    assert stored.memory.scale == pytest.approx(float(plain[:3](images()).detach().max()) / 255)
    assert model[4].parametrizations.weight[0].scale == pytest.approx(float(plain[4].weight.detach().abs().max()) / 7)
    assert torch.equal(plain[0].weight, network()[0].weight)  # the input is untouched


def test_signed_outputs_where_calibration_sees_them():
    model = surgery.with_noisy_memory(network(), {"1/activation": BANK}, calibration=[images()])
    assert model[1].memory.signed
    values = network()[:2](images())
    assert model[1].memory.scale == pytest.approx(float(values.detach().abs().max()) / 127)


def test_it_comes_off_cleanly():
    plain = network()
    clean = surgery.without_noisy_memory(noisy_network())
    assert list(clean.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(clean.state_dict().values(), plain.state_dict().values(), strict=True))
    assert torch.equal(clean(images()), plain(images()))
    assert type(clean[0]) is nn.Conv2d


def test_the_model_that_it_came_off_a_copy_of_still_works():
    model = noisy_network()
    twin = copy.deepcopy(model)
    expected = copy.deepcopy(model)(images())
    surgery.without_noisy_memory(model)
    assert torch.equal(model(images()), expected)
    surgery.without_noisy_memory(twin)
    assert torch.equal(twin(images()), expected)
    assert isinstance(model[0].parametrizations.weight[0], NoisyMemory)


def test_state_dict_and_deepcopy():
    model = noisy_network()
    model(images())
    twin = copy.deepcopy(model)
    other = noisy_network()
    other.load_state_dict(model.state_dict())
    expected = model(images())
    assert torch.equal(twin(images()), expected)
    assert torch.equal(other(images()), expected)
    assert int(model[2].memory.passes) == 2


def test_gradients_reach_stored_weights():
    model = noisy_network()
    model(images()).square().sum().backward()
    assert model[0].parametrizations.weight.original.grad.abs().sum() > 0


def test_compiled_without_a_graph_a_pass():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = noisy_network()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(images())
        reference(images())
        after_first = len(graphs)
        for _ in range(3):
            assert torch.equal(compiled(images()), reference(images()))
    assert len(graphs) == after_first


def test_under_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = noisy_network()
        expected = copy.deepcopy(model)(images())
        parallel = nn.parallel.DistributedDataParallel(model)
        got = parallel(images())
        assert torch.equal(got, expected)
        got.sum().backward()
        assert model[0].parametrizations.weight.original.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_slices_of_a_batch_draw_what_the_whole_draws():
    model, x = noisy_network(), images(7)
    set_memory_pass(model, 3)
    whole = model(x)
    for cuts in ((0, 3, 7), (0, 1, 2, 7), (0, 7)):
        parts = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            set_memory_pass(model, 3, first_sample=start)
            parts.append(model(x[start:stop]))
        assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    # The control: slices that do not know their place draw other bits.
    set_memory_pass(model, 3)
    model(x[:3])
    set_memory_pass(model, 3)
    assert not torch.allclose(model(x[3:]), whole[3:], atol=1e-2)
    stored = model[2].memory
    stored.set_pass(3)
    values = torch.rand(7, 4, 6, 6)
    at_once = stored(values)
    stored.set_pass(3, first_sample=5)
    assert torch.equal(stored(values[5:]), at_once[5:])  # of the same values, to the bit


@pytest.mark.slow
def test_ranks_of_a_data_parallel_model_draw_what_one_process_draws(run_python, tmp_path):
    """Two processes, each with half of the batch: outputs of one process, and gradients' mean over ranks."""
    script = f"""
import sys; sys.path[:0] = {[str(p) for p in (__import__("pathlib").Path(__file__).parent,)]!r}
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from test_memory import images, noisy_network
from pyaccel.nn import set_memory_pass

def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(noisy_network())
    half = images(8)[4 * rank : 4 * rank + 4]
    for number in (0, 1, 5):
        set_memory_pass(model, number, first_sample=4 * rank)
        model.zero_grad()
        out = model(half)
        out.square().mean().backward()
    torch.save((out.detach(), model.module[4].parametrizations.weight.original.grad), folder + f"/{{rank}}.pt")
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(worker, ({str(tmp_path)!r},), nprocs=2)
"""
    file = tmp_path / "two.py"
    file.write_text(script)
    done = run_python(f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')")
    assert done.returncode == 0, done.stderr
    (first, gradient), (second, same) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    model = noisy_network()
    set_memory_pass(model, 5)
    whole = model(images(8))
    whole.square().mean().backward()
    assert torch.allclose(torch.cat([first, second]), whole, atol=1e-5)
    assert torch.equal(gradient, same)
    assert torch.allclose(gradient, model[4].parametrizations.weight.original.grad, atol=1e-5)


def test_sites_are_found_again_and_take_other_banks():
    sites = {"0/weight": BANK, "0/activation": BANK, "4/weight": SramConfig(4, n8t=1, p6=0.05)}
    model = surgery.with_noisy_memory(network(), sites, calibration=[images()])
    found = noisy_sites(model)
    assert set(found) == set(sites) and found["0/weight"] is model[0].layer.parametrizations.weight[0]
    assert noisy_sites(network()) == {}
    found["0/weight"].set_bank(SramConfig(8, n8t=8), seed=4)
    other = surgery.with_noisy_memory(network(), {"0/weight": SramConfig(8, n8t=1, p6=0.3)}, seed=4)
    safe = surgery.with_noisy_memory(network(), {"0/weight": SramConfig(8, n8t=8)})
    assert torch.equal(model[0].layer.weight, safe[0].weight)
    found["0/weight"].set_bank(SramConfig(8, n8t=1, p6=0.3), seed=4)
    assert torch.equal(model[0].layer.weight, other[0].weight)
    with pytest.raises(ValueError, match="step belongs to words of 8 bits, got 4"):
        found["0/weight"].set_bank(SramConfig(4, n8t=1), seed=0)
    with pytest.raises(ValueError, match="semantics must be flip"):
        found["0/weight"].set_bank(SramConfig(8, n8t=1, semantics="stuck"), seed=0)
    with pytest.raises(ValueError, match="first_sample must be >= 0, got -1"):
        found["0/activation"].set_pass(0, first_sample=-1)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({"7/weight": BANK}, "has no layer '7'; its layers are 0, 1, 2, 3, 4"),
        ({"0": BANK}, 'a site is "LAYER/weight" or "LAYER/activation", got \'0\''),
        ({"0/bias": BANK}, "a site is"),
        ({"2/weight": BANK}, r"2 \(ReLU\) has no weight"),
        ({"2/activation": BANK}, "need calibration="),
    ],
)
def test_wrong_sites(sites, message):
    with pytest.raises(ValueError, match=message):
        surgery.with_noisy_memory(network(), sites)


def test_sites_that_are_taken():
    model = noisy_network()
    with pytest.raises(ValueError, match="0 has a parametrised weight already"):
        surgery.with_noisy_memory(model, {"0/weight": BANK})
    with pytest.raises(ValueError, match="output of 2 is stored already"):
        surgery.with_noisy_memory(model, {"2/activation": BANK}, calibration=[images()])
