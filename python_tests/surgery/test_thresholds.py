"""surgery.balance_thresholds and streaming: thresholds from the network's own spikes, any T at constant memory."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyaccel import models, surgery
from pyaccel.data import Batch
from pyaccel.nn import BNTTLIF
from pyaccel.surgery.streaming import first_step
from pyaccel.surgery.thresholds import set_threshold


def network(seed: int = 0, neuron: str = "delayed", **options):
    torch.manual_seed(seed)
    ann = models.build("vgg5_hybrid", classes=10, spiking=False, width=0.0625)
    for layer in ann:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return surgery.to_spiking(ann, steps=20, neuron=neuron, **options), torch.rand(3, 3, 32, 32) * 2 - 1


def currents_of(snn, images, steps: int) -> dict[str, torch.Tensor]:
    """All currents of all layers, in one piece."""
    found = {}
    hooks = [
        n.register_forward_pre_hook(lambda m, a, name=name: found.__setitem__(name, a[0]))
        for name, n in snn.neurons.items()
    ]
    with torch.no_grad():
        snn.eval().step_logits(images, None, steps)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("neuron", ["delayed", "stdb", "prompt"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thresholds_are_the_largest_currents(seed, neuron):
    """In order, each layer on the spikes of those before it: the finished network meets exactly these currents."""
    snn, images = network(seed, neuron)
    balanced = surgery.balance_thresholds(snn, [images], steps=60, chunk=7)
    largest = {name: float(current.max()) for name, current in currents_of(balanced, images, 60).items()}
    assert surgery.thresholds(balanced) == pytest.approx(largest, rel=1e-6)
    assert set(surgery.thresholds(snn).values()) == {1.0}, "the network given stays as it was"


def test_a_percentile_is_the_largest_nearest_rank_of_a_step():
    snn, images = network(1)
    balanced = surgery.balance_thresholds(snn, [images], steps=40, percentile=97.0, chunk=9)
    for name, current in currents_of(balanced, images, 40).items():
        rows = current.flatten(1).numpy()
        expected = np.percentile(rows, 97.0, axis=1, method="inverted_cdf").max()
        assert surgery.thresholds(balanced)[name] == pytest.approx(float(expected), rel=1e-6)
    whole = surgery.balance_thresholds(snn, [images], steps=40, percentile=100)
    assert surgery.thresholds(whole) == surgery.thresholds(surgery.balance_thresholds(snn, [images], steps=40))


def test_thresholds_grow_with_the_search():
    """More steps and more images can only find a larger first threshold."""
    snn, images = network(2)

    def first(batches, steps) -> float:
        return next(iter(surgery.thresholds(surgery.balance_thresholds(snn, batches, steps=steps)).values()))

    values = [first([images[:1]], 20), first([images[:1]], 60), first([images], 60), first([images, -images], 60)]
    assert values == sorted(values) and values[0] < values[-1]


@pytest.mark.parametrize("seed", [0, 1])
def test_scaled_weights_scale_the_threshold_and_leave_the_spikes(seed):
    snn, images = network(seed)
    scaled, _ = network(seed)
    layers = [m for m in scaled.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.mul_(2.0 ** (i - 1))  # powers of two: no rounding
    found, other = (surgery.balance_thresholds(n, [images], steps=40) for n in (snn, scaled))
    for i, (a, b) in enumerate(
        zip(surgery.thresholds(found).values(), surgery.thresholds(other).values(), strict=True)
    ):
        assert b == a * 2.0 ** (i - 1)
    assert torch.equal(found.eval()(images), other.eval()(images))
    set_threshold(other, list(other.neurons.values())[0], 0.3)  # the control
    assert not torch.equal(found(images), other(images))


def test_scale_leak_and_layers():
    snn, images = network(0, leak=0.5)
    whole = surgery.thresholds(surgery.balance_thresholds(snn, [images], steps=40))
    without = surgery.thresholds(surgery.balance_thresholds(network(0)[0], [images], steps=40))
    assert whole == without, "the search runs without leak"
    balanced = surgery.balance_thresholds(snn, [images], steps=40, scale=0.7)
    assert surgery.thresholds(balanced) == pytest.approx({k: 0.7 * v for k, v in whole.items()})
    assert all(n.leak == 0.5 for n in balanced.neurons.values())
    names = list(whole)
    some = surgery.thresholds(surgery.balance_thresholds(snn, [images], steps=40, layers=names[:2]))
    assert [some[n] == whole[n] for n in names[:2]] == [True, True] and {some[n] for n in names[2:]} == {1.0}


def test_batches_of_every_form_and_networks_of_the_library():
    built = models.build("vgg5_hybrid", classes=10, spiking=True, width=0.0625, steps=20, neuron="delayed")
    snn, images = network()
    for a, b in zip(built.parameters(), snn.parameters(), strict=True):
        a.data.copy_(b.data)
    batch = Batch(images, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    found = [list(surgery.thresholds(surgery.balance_thresholds(m, [b], steps=30)).values())
             for m, b in ((snn, images), (snn, (images, 0)), (snn, batch), (built, batch))]  # fmt: skip
    assert found[0] == found[1] == found[2] == found[3]


def test_refusals_of_balancing():
    snn, images = network()
    for options, text in [
        (dict(percentile=0), "percentile must be above 0"), (dict(percentile=101), "at most 100"), (dict(scale=0),
        "scale must be"),
        (dict(steps=0), "steps must be"), (dict(layers=["x"]), "no neurons are called 'x'; these are body.1, body.4"),
        (dict(steps=2), "more spiking layers than steps"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            surgery.balance_thresholds(snn, [images], **options)
    with pytest.raises(ValueError, match="at least one batch"):
        surgery.balance_thresholds(snn, [])
    with pytest.raises(ValueError, match="BNTT normalises what its neurons get"):
        surgery.balance_thresholds(models.build("vgg9_bntt", classes=10, width=0.1), [images])


# ---- delay


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("neuron", ["delayed", "stdb"])
def test_nothing_comes_out_before_as_many_steps_as_there_are_layers(neuron, seed):
    """Five spiking layers, thresholds so low that each fires as soon as it may."""
    snn, images = network(seed, neuron, threshold=1e-3)
    logits = snn.eval().step_logits(images)
    assert (logits[:5] == 0).all() and (logits[5].abs().amax(1) > 0).all()
    short = snn(images, steps=5)
    loss = nn.functional.cross_entropy(short, torch.tensor([1, 2, 3]))
    loss.backward()
    assert loss.item() == pytest.approx(np.log(10), abs=1e-6)
    assert all(p.grad is None or not p.grad.any() for n, p in snn.named_parameters() if "11" not in n)
    assert (network(seed, "prompt", threshold=1e-3)[0].eval().step_logits(images)[0] != 0).any(), "the control"


# ---- streaming


@pytest.mark.parametrize("mean_readout", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 25, 100])
def test_streams_say_what_one_pass_says(chunk, mean_readout):
    snn, images = network(1, mean_readout=mean_readout, threshold=0.3)
    ids = torch.tensor([7, 1, 5])
    with torch.no_grad():
        expected = snn.eval().step_logits(images, ids, 40)
    found = surgery.stream_logits(snn, images, at=(1, 7, 8, 33, 40), chunk=chunk, sample_ids=ids)
    torch.testing.assert_close(found, expected[[0, 6, 7, 32, 39]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(surgery.stream_logits(snn, images, steps=40, chunk=chunk, sample_ids=ids), expected[-1])
    assert expected[-1].abs().max() > 0.1
    assert torch.equal(snn.step_logits(images, ids, 40), expected), "nothing is left behind"


def test_streaming_keeps_modes_and_leaves_nothing_after_an_error():
    snn, images = network(0)
    snn.train()
    with pytest.raises(RuntimeError), surgery.streaming(snn), first_step(snn.encoder, 9):
        assert not snn.training
        snn(images)
        raise RuntimeError
    assert snn.training and all(m.training for m in snn.modules())
    assert not any(n.stateful or n.membrane is not None for n in snn.neurons.values()) and int(snn.encoder.key[2]) == 0


def test_refusals_of_streaming():
    snn, images = network()
    for options, text in [
        (dict(at=(3, 2)), "increasing"), (dict(at=(5,), steps=4), "up to steps"), (dict(chunk=0), "chunk must be"),
        (dict(steps=0), "steps"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            surgery.stream_logits(snn, images, **options)
    bntt = models.build("vgg5", classes=10, spiking=True, width=0.1, steps=6)
    with pytest.raises(ValueError, match="6 steps"):
        surgery.stream_logits(bntt, images, steps=7, chunk=3)


def test_a_bntt_network_streams_up_to_its_steps():
    bntt, images = models.build("vgg5", classes=10, spiking=True, width=0.1, steps=6), network()[1]
    for module in bntt.modules():
        if isinstance(module, BNTTLIF):
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)  # other ones at each step
    with torch.no_grad():
        expected = bntt.eval().step_logits(images)
    found = surgery.stream_logits(bntt, images, at=(2, 5, 6), chunk=4)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected[[1, 4, 5]], rtol=1e-5, atol=1e-6)


class Peak(TorchDispatchMode):
    """The largest number of bytes in tensors that operations made and that were alive together."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak(job) -> int:
    with Peak() as found:
        job()
    return found.most


def test_memory_does_not_grow_with_steps():
    snn, images = network()

    def stream(steps):
        return lambda: surgery.stream_logits(snn, images, steps=steps, chunk=10)

    def balance(steps):
        return lambda: surgery.balance_thresholds(snn, [images], steps=steps, chunk=10)

    for job in (stream, balance):
        short, long = peak(job(20)), peak(job(200))
        assert short <= long <= 1.02 * short, (short, long)
    with torch.no_grad():  # the control: one pass grows
        assert peak(lambda: snn(images, steps=200)) > 5 * peak(lambda: snn(images, steps=20))
