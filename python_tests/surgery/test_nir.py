"""NIR: what is written reads back as the same spikes; what NIR cannot say is refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pyaccel import models
from pyaccel.nn import BNTTLIF, IF, LIF, STDBLIF, SpikeAvgPool2d, SpikeConv2d, SpikeLinear, every_step
from pyaccel.surgery import from_nir, to_nir, to_spiking

nir = pytest.importorskip("nir")


def network(name="vgg5", side=16, **options):
    """A narrow network whose every layer spikes."""
    torch.manual_seed(0)
    options = dict(norm="none", neuron="lif", width=0.1, steps=6, gain=1.0, leak=0.9) | options
    model = models.build(name, spiking=True, classes=5, input_shape=(3, side, side), **options).eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight, gain=3)
    return model


def spikes_of(model, given):
    """The output, and the spikes of every LIF by name."""
    found = {}
    handles = [m.register_forward_hook(lambda m, a, out, name=n: found.__setitem__(name, out))
               for n, m in model.named_modules() if isinstance(m, LIF)]  # fmt: skip
    with torch.no_grad():
        out = model(given)
    for handle in handles:
        handle.remove()
    return out, found


NETWORKS = {
    "soft reset": ("vgg5", {}),
    "soft reset, no leak": ("vgg5", dict(leak=1.0)),
    "hard reset": ("vgg9_bntt", dict(reset="hard")),
    "hard reset, no leak": ("vgg5", dict(reset="hard", leak=1.0)),
    "no reset": ("vgg5", dict(reset="none", leak=0.5)),
    "small leak": ("vgg5", dict(leak=0.3, threshold=0.7)),
    "hidden layers alone": ("mlp", {}),
    "dropout": ("vgg5_hybrid", dict(threshold=0.4)),
    "residual": ("resnet20", dict(threshold=0.4, reset="hard")),
    "residual, soft, mean over pixels": ("resnet18", dict(width=0.03, threshold=0.4)),
    "learnt leak and threshold": ("vgg5", dict(learn_leak=True, learn_threshold=True)),
}


@pytest.mark.parametrize("case", NETWORKS)
@pytest.mark.parametrize("through_a_file", [True, False])
def test_round_trip_has_the_same_spikes(case, through_a_file, tmp_path):
    name, options = NETWORKS[case]
    model = network(name, **options)
    graph = to_nir(model, (3, 16, 16), spikes_in=True, unroll_reset=options.get("reset", "soft") == "soft")
    if through_a_file:
        nir.write(tmp_path / "a.nir", graph)
        graph = tmp_path / "a.nir"
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        spikes = model.encoder(images)
    logits, expected = spikes_of(model, images)
    out, found = spikes_of(from_nir(graph).eval(), spikes)
    assert len(found) == len(expected) > 0
    for (n, s), theirs in zip(expected.items(), found.values(), strict=True):
        assert 0.001 < s.mean() < 0.999 and torch.equal(s, theirs), n
    torch.testing.assert_close(out[-1], logits)


def test_readout_of_each_step():
    model = network(reset="hard")
    images = torch.rand(2, 3, 16, 16)
    spikes = model.encoder(images)
    out = from_nir(to_nir(model, (3, 16, 16), spikes_in=True, readout="steps"))(spikes)
    torch.testing.assert_close(out.mean(0), model(images))
    added = from_nir(to_nir(model, (3, 16, 16), spikes_in=True))(spikes)
    torch.testing.assert_close(added, out.cumsum(0) / 6)


def test_a_network_that_reads_events_needs_no_word_for_an_encoder():
    model = models.build("vgg5", spiking=True, classes=3, input_shape=(2, 16, 16), width=0.1, steps=4, norm="none",
                         neuron="lif", reset="hard", input="events").eval()  # fmt: skip
    events = torch.randint(0, 4, (4, 2, 2, 16, 16)).float()
    torch.testing.assert_close(from_nir(to_nir(model, (2, 16, 16)))(events)[-1], model(events))


@pytest.mark.parametrize("name", ["vgg5_hybrid", "resnet20", "vgg5"])
@pytest.mark.parametrize("biases", [False, True])
def test_a_converted_network(name, biases):
    torch.manual_seed(0)
    options = dict(norm="batch" if biases else "none") | (dict(pool="average") if name == "vgg5" else {})
    ann = models.build(name, spiking=False, classes=5, input_shape=(3, 16, 16), width=0.1, **options)
    for module in ann.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.2, 0.2)
    snn = to_spiking(ann.eval(), steps=8, neuron="prompt", fold_batchnorm=biases, keep_biases=biases).double()
    for i, neuron in enumerate(snn.neurons.values()):
        neuron.threshold.fill_(0.3 + 0.1 * i)
    snn.update_units()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    spikes = snn.encoder(images)
    logits, expected = spikes_of(snn, images)
    with pytest.raises(ValueError, match="NIR has no random encoder"):
        to_nir(snn, (3, 16, 16), unroll_reset=True)
    out, found = spikes_of(from_nir(to_nir(snn, (3, 16, 16), spikes_in=True, unroll_reset=True)), spikes)
    assert len(found) == len(expected) > 1
    for ours, theirs in zip(expected.values(), found.values(), strict=True):
        assert torch.equal(ours, theirs)
    assert sum(s.sum() for s in expected.values()) > 100
    torch.testing.assert_close(out[-1], logits)


def test_a_converted_network_with_the_paper_s_neuron_is_refused():
    ann = models.build("vgg5_hybrid", spiking=False, classes=5, input_shape=(3, 16, 16), width=0.1)
    with pytest.raises(ValueError, match="a delayed neuron fires on the membrane of the step before"):
        to_nir(to_spiking(ann, steps=8), (3, 16, 16), spikes_in=True, unroll_reset=True)


def test_parameters_of_a_channel():
    torch.manual_seed(0)
    model = nn.Sequential(
        SpikeConv2d(2, 3, 3, stride=2, padding=1, kind="any"), LIF(reset="hard", learn_leak=3, learn_threshold=3),
        nn.Flatten(2), SpikeLinear(48, 4), LIF(threshold=0.05, reset="hard", learn_leak=4),
    )  # fmt: skip
    with torch.no_grad():
        model[1].leak.copy_(torch.tensor([0.2, 0.9, 0.5]))
        model[1].threshold.copy_(torch.tensor([0.1, 0.2, 0.3]))
        model[4].leak.copy_(torch.rand(4))
    graph = to_nir(model, (2, 8, 8))
    assert graph.nodes["1"].tau.shape == (3, 4, 4)
    back = from_nir(graph)
    assert torch.equal(back.node("1").leak, model[1].leak)
    assert torch.equal(back.node("1").threshold, model[1].threshold)
    given = torch.randn(7, 2, 2, 8, 8)
    assert torch.equal(back(given), model(given)) and model(given).sum() > 0


def test_nodes_hold_the_equation_of_the_standard():
    """One neuron by NIR's own definition, Euler's rule with a tenth of the step: the same membrane to first order."""
    graph = to_nir(nn.Sequential(LIF(0.9, 5.0, reset="hard")), (1,), dt=1e-3)
    node = graph.nodes["0"]
    assert node.tau.item() == pytest.approx(1e-2) and node.r.item() == pytest.approx(10)
    assert node.v_threshold.item() == 5
    assert node.v_leak.item() == node.v_reset.item() == 0
    assert graph.metadata["dt"] == 1e-3
    v, times = 0.0, 0
    for _ in range(200):
        v += 1e-3 / node.tau.item() * (node.v_leak.item() - v + node.r.item() * 0.8)
        if v > node.v_threshold.item():
            v, times = node.v_reset.item(), times + 1
    spikes = from_nir(graph)(torch.full((200, 1, 1), 0.8, dtype=torch.float64))
    assert spikes.sum() == times > 5


def test_soft_reset_unrolled_is_the_same_arithmetic_node_by_node():
    """Integrator, Threshold and feedback one step later, run as any tool would, give the spikes of the neuron."""
    leak, threshold, dt = 0.75, 1.25, 1e-4
    graph = to_nir(nn.Sequential(LIF(leak, threshold)), (3,), unroll_reset=True)
    integrator, feedback = graph.nodes["0.membrane"], graph.nodes["0.reset"]
    assert {("0", "0.reset"), ("0.reset", "0.membrane"), ("0.membrane", "0")} <= set(graph.edges)
    currents = torch.randint(0, 9, (40, 3), generator=torch.Generator().manual_seed(0)).double().numpy() / 8
    v, spikes, found = np.zeros(3), np.zeros(3), []
    for current in currents:
        current = current + feedback.scale * spikes
        v = v + dt / integrator.tau * (integrator.v_leak - v + integrator.r * current)
        spikes = (v > graph.nodes["0"].threshold).astype(float)
        found.append(spikes)
    expected = LIF(leak, threshold)(torch.from_numpy(currents)[:, None])[:, 0].numpy()
    assert np.array_equal(np.stack(found), expected) and 0.2 < expected.mean() < 0.8


def test_a_folded_batch_normalisation_gives_the_same_spikes_but_for_rounding():
    model = network("vgg9_bntt", norm="shared", reset="hard").double().train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(8, 3, 16, 16, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.8, 1.6)
    model.eval()
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    spikes = model.encoder(images)
    _, expected = spikes_of(model, images)
    _, found = spikes_of(from_nir(to_nir(model, (3, 16, 16), spikes_in=True, fold_batchnorm=True)), spikes)
    for ours, theirs in zip(expected.values(), found.values(), strict=True):
        assert torch.equal(ours, theirs) and ours.mean() > 0.001
    with pytest.raises(ValueError, match=r"features\.0\.synapse: NIR has no batch normalisation; pass fold_"):
        to_nir(model, (3, 16, 16), spikes_in=True)


LAYER = SpikeLinear(4, 3)
REFUSED = {
    "BNTT": (nn.Sequential(LAYER, BNTTLIF(3, 5)), {}, "1: BNTT normalises every time step differently"),
    "delayed": (nn.Sequential(LIF(delay=True, reset="hard")), {}, "0: a delayed neuron fires on the membrane of the"),
    "STDB": (nn.Sequential(STDBLIF()), {}, "0: a delayed neuron"),
    "soft reset": (nn.Sequential(LAYER, LIF()), {}, r"1: NIR's neurons reset to a value.*unroll_reset=True.*'hard'"),
    "encoder": (network(reset="hard"), dict(input_shape=(3, 16, 16)), "NIR has no random encoder; pass spikes_in=True"),
    "normalised residual": (network("resnet20", norm="shared", reset="hard"),
                            dict(input_shape=(3, 16, 16), spikes_in=True, fold_batchnorm=True), "behind a residual"),
    "groups": (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), dict(input_shape=(2, 5, 5)), "0: nir takes the shape"),
    "another layer": (nn.Sequential(nn.ReLU()), {}, r"0 \(ReLU\) has no NIR node; known are"),
    "maximum": (nn.Sequential(nn.MaxPool2d(2)), {}, r"0 \(MaxPool2d\) has no NIR node"),
    "flatten": (nn.Sequential(nn.Flatten()), {}, r"expected nn.Flatten\(2\) over"),
    "no flatten": (nn.Sequential(SpikeLinear(4, 3)), dict(input_shape=(2, 4, 4)), r"put nn\.Flatten\(2\) before it"),
    "leak beyond 1": (nn.Sequential(LIF(1.5, reset="hard")), {}, "leak must be above 0 and at most 1"),
    "no container": (LIF(reset="hard"), {}, "expected a spiking network or an nn.Sequential, got LIF"),
    "dt": (nn.Sequential(LAYER), dict(dt=0.0), "dt must be positive"),
    "readout": (nn.Sequential(LAYER), dict(readout="sum"), "readout must be one of integrate, steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_nir_cannot_say_is_refused_by_name(case):
    model, options, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        to_nir(model, **dict(input_shape=(4,)) | options)


def graph_of(*nodes, edges=None, **more):
    """Input, the nodes in a row, Output; `more`: further nodes by name, joined by `edges`."""
    named = {"input": nir.Input(np.array([3])), **{str(i): node for i, node in enumerate(nodes)}, **more}
    named["output"] = nir.Output(np.array([3]))
    row = ["input", *map(str, range(len(nodes))), "output"]
    return nir.NIRGraph(named, list(zip(row, row[1:], strict=False)) + (edges or []), metadata={}, type_check=False)


ONE = np.ones(3)


def lif(tau=2e-4, r=2.0, v_leak=0.0, v_threshold=1.0, v_reset=0.0):
    return nir.LIF(tau * ONE, r * ONE, v_leak * ONE, v_threshold * ONE, v_reset * ONE)


UNREADABLE = {
    "v_leak": (graph_of(lif(v_leak=0.5)), "node '0': v_leak must be 0, got 0.5"),
    "v_reset": (graph_of(lif(v_reset=-1.0)), "node '0': v_reset must be 0, got 1"),
    "step beyond tau": (graph_of(lif(tau=5e-5)), r"node '0': tau must be at least the step, 0\.0001 s, got 5e-05"),
    "unknown node": (graph_of(nir.Delay(ONE)), r"node '0' \(Delay\) is not read; known are Linear"),
    "current based": (graph_of(nir.CubaLIF(*[ONE] * 5)), r"\(CubaLIF\) is not read"),
    "recurrent": (graph_of(lif(), r=nir.Linear(np.eye(3)), edges=[("0", "r"), ("r", "0")]), "recurrent connections"),
    "threshold alone": (graph_of(nir.Threshold(ONE)), "expected one LI or I node before it, got input"),
    "another feedback": (graph_of(nir.I(1e4 * ONE), nir.Threshold(ONE), r=nir.Scale(-0.5 * ONE),
                                  edges=[("1", "r"), ("r", "0")]),
                         "node 'r': feedback to '0' is read only as a Scale of -leak"),
    "membrane read": (graph_of(nir.I(1e4 * ONE), nir.Threshold(ONE), edges=[("0", "output")]), "its membrane is read"),
    "two inputs": (graph_of(lif(), b=nir.Input(np.array([3])), edges=[("b", "0")]), "one Input node, got input, b"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_named(case):
    graph, text = UNREADABLE[case]
    with pytest.raises(ValueError, match=text):
        from_nir(graph)


def test_parameters_that_differ_within_a_channel_are_refused():
    shape = (2, 3, 3)
    threshold = np.ones(shape)
    threshold[1, 0, 0] = 2
    nodes = {"input": nir.Input(np.array(shape)), "a": nir.IF(np.full(shape, 1e4), threshold),
             "output": nir.Output(np.array(shape))}  # fmt: skip
    with pytest.raises(ValueError, match="node 'a': threshold differs within a channel"):
        from_nir(nir.NIRGraph(nodes, [("input", "a"), ("a", "output")], metadata={}))


def test_gains_scale_sums_and_integrators_are_what_their_equations_say():
    x = torch.rand(5, 2, 3)
    assert torch.equal(from_nir(graph_of(lif(r=1.0)))(x), LIF(0.5, reset="hard")(0.5 * x))
    assert torch.equal(from_nir(graph_of(nir.IF(1e3 * ONE, ONE)), dt=2e-3)(x), IF(reset="hard")(2 * x))
    torch.testing.assert_close(from_nir(graph_of(nir.Scale(np.array([1.0, 2, 3]))))(x), x * torch.tensor([1.0, 2, 3]))
    torch.testing.assert_close(from_nir(graph_of(nir.I(1e4 * ONE)))(x), x.cumsum(0))
    membrane, found = torch.zeros(2, 3), []
    for current in x:
        membrane = membrane + 0.25 * (2 * current - membrane)
        found.append(membrane)
    torch.testing.assert_close(from_nir(graph_of(nir.LI(4e-4 * ONE, 2 * ONE, 0 * ONE)))(x), torch.stack(found))
    doubled = graph_of(nir.Scale(ONE), edges=[("input", "output")])
    torch.testing.assert_close(from_nir(doubled)(x), 2 * x)


def test_convolutions_and_pooling_of_other_tools():
    shape, rng = (2, 9, 9), np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 1, 3, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    nodes = {
        "input": nir.Input(np.array(shape)),
        "a": nir.Conv2d((9, 9), weight, 1, "same", 1, 2, bias),
        "b": nir.SumPool2d(np.array([3, 3]), np.array([2, 2]), np.array([1, 1])),
        "c": nir.Flatten(np.array([4, 5, 5]), 0, -1),
        "output": nir.Output(np.array([100])),
    }
    row = list(nodes)
    x = torch.randn(3, 2, *shape)
    expected = nn.functional.conv2d(x.flatten(0, 1), torch.tensor(weight), torch.tensor(bias), padding=1, groups=2)
    expected = nn.functional.avg_pool2d(expected, 3, 2, 1) * 9
    # nir 1.0.8 takes the shape of a grouped convolution's input from its weight, and would refuse this graph.
    found = from_nir(nir.NIRGraph(nodes, list(zip(row, row[1:], strict=False)), metadata={}, type_check=False))(x)
    torch.testing.assert_close(found, expected.flatten(1).unflatten(0, (3, 2)))


def test_what_is_read_trains_and_keeps_bits_of_spikes():
    written = to_nir(nn.Sequential(SpikeLinear(4, 8), LIF(reset="hard"), SpikeLinear(8, 3)), (4,))
    model = from_nir(written, surrogate="atan")
    assert model.node("1").neuron["surrogate"] == "atan"
    assert (model.node("0").kind, model.node("2").kind) == ("any", "binary")
    model(3 * torch.rand(6, 2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and model.node("0").weight.grad.abs().sum() > 0


def test_pooling_is_the_same_as_before():
    model = nn.Sequential(SpikeAvgPool2d((2, 3)))
    x = torch.rand(2, 3, 4, 6, 7)
    assert torch.equal(from_nir(to_nir(model, (4, 6, 7)))(x), every_step(nn.AvgPool2d((2, 3)), x))


def test_the_input_stays_untouched():
    model = network(reset="hard")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = to_nir(model, (3, 16, 16), spikes_in=True)
    graph.nodes["features.0.synapse"].weight += 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not math.isclose(float(graph.nodes["readout"].weight.sum()), 0.0)


def test_without_the_package_the_extra_is_named(run_python):
    done = run_python("import sys; sys.modules['nir'] = None\nimport pyaccel.surgery as s, torch\n"
                      "try: s.to_nir(torch.nn.Sequential(), (1,))\nexcept ImportError as e: print(e)")  # fmt: skip
    assert 'pip install "pyaccel[nir]"' in done.stdout, done.stderr
