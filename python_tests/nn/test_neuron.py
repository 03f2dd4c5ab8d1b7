"""`nn.LIF`, `nn.IF`, `nn.BNTTLIF`, `nn.STDBLIF`: the operators with parameters, buffers and state."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn as torch_nn
from torch._dynamo.testing import CompileCounterWithBackend

from pyaccel import nn, ops


def make(name: str, **options) -> torch_nn.Module:
    return {
        "LIF": lambda: nn.LIF(0.9, 0.8, **options),
        "IF": lambda: nn.IF(0.8, **options),
        "STDBLIF": lambda: nn.STDBLIF(0.9, 0.8, **options),
        "BNTTLIF": lambda: nn.BNTTLIF(3, 6, **options),
    }[name]()


MODULES = ["LIF", "IF", "STDBLIF", "BNTTLIF"]
X = 0.3 + torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))


def test_modules_are_their_operators():
    assert torch.equal(
        nn.LIF(0.9, 0.8, reset="hard", surrogate="atan")(X), ops.lif(X, leak=0.9, threshold=0.8, reset="hard")[0]
    )
    assert torch.equal(nn.LIF(0.9, delay=True)(X), ops.lif(X, leak=0.9, delay=True)[0])
    assert torch.equal(nn.LIF()(X), ops.lif(X, leak=0.95)[0])
    assert torch.equal(nn.IF(0.8)(X), ops.lif(X, leak=1.0, threshold=0.8)[0])
    assert torch.equal(nn.STDBLIF(0.9, 0.8)(X), ops.stdb_lif(X, leak=0.9, threshold=0.8)[0])
    assert torch.equal(nn.BNTTLIF(3, 6)(X), ops.bntt_lif(X, torch.ones(6, 3))[0])


@pytest.mark.parametrize(
    "options",
    [dict(surrogate="sigmoid", surrogate_scale=2.0, surrogate_width=3.0), dict(detach_reset=False, reset="hard")],
)
def test_options_reach_the_gradient(options):
    found = []
    for run in (
        lambda x: nn.LIF(0.9, **options)(x),
        lambda x: ops.lif(x, leak=0.9, **options)[0],
        lambda x: ops.lif(x, leak=0.9)[0],
    ):
        x = X.clone().requires_grad_()
        run(x).sum().backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("form, changed", [("exact", False), ("fp32_underflow", True)])
def test_stdb_options_reach_the_gradient(form, changed):
    found = []
    for run in (
        lambda x: nn.STDBLIF(form=form, alpha=0.5, beta=0.02)(x),
        lambda x: ops.stdb_lif(x, form=form, alpha=0.5, beta=0.02)[0],
    ):
        x = (1 + X).requires_grad_()
        run(x).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found) and (found[0] != 0).any()


@pytest.mark.parametrize("name", MODULES)
def test_every_call_starts_afresh(name):
    module = make(name).eval()
    assert torch.equal(module(X), module(X))


@pytest.mark.parametrize("name", ["LIF", "IF", "STDBLIF"])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_chunks_with_state_are_one_call(name, cut):
    results = []
    for bounds in ([0, 6], [0, cut, 6]):
        module, x = make(name, stateful=True), X.clone().requires_grad_()
        spikes = torch.cat([module(x[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
        (spikes * X.roll(1)).sum().backward()
        results.append((spikes.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)
    plain = make(name)
    assert not torch.equal(
        results[0][0], torch.cat([plain(X[:2]), plain(X[2:])])
    )  # without state chunks are not one call


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cuts", [[2], [1, 3, 5], [1, 2, 3, 4, 5]])
def test_chunks_with_state_are_one_call_of_bntt(training, cuts):
    results = []
    for bounds in ([0, 6], [0, *cuts, 6]):
        module = nn.BNTTLIF(3, 6, stateful=True).train(training)
        with torch.no_grad():
            module.weight.copy_(torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) + 0.5)
            module.running_mean.copy_(torch.randn(6, 3, generator=torch.Generator().manual_seed(2)))
        x = X.clone().requires_grad_()
        for _ in range(2):  # a second sequence starts again at the first row
            module.reset_state()
            spikes = torch.cat([module(x[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
        assert module.first_step == 6 and module.num_batches_tracked == (2 if training else 0)
        (spikes * X.roll(1)).sum().backward()
        results.append((spikes.detach(), module.running_mean, module.running_var, x.grad, module.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:3], results[1][:3], strict=True))
    for a, b in zip(results[0][3:], results[1][3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_stream_of_bntt_ends_at_its_last_row():
    module = nn.BNTTLIF(3, 6, stateful=True).eval()
    module(X[:4])
    with pytest.raises(ValueError, match=r"BNTTLIF: trained for 6 steps, got 3 after 4 others; reset_state\(\) starts a new"):
        module(X[:3])
    assert module.first_step == 4  # and goes on where it was
    module(X[4:])
    assert module.first_step == 6 and module(X[:0]).shape == (0, 4, 3, 5)
    module.reset_state()
    assert torch.equal(module(X), nn.BNTTLIF(3, 6).eval()(X))


@pytest.mark.parametrize("name", MODULES)
def test_state_is_forgotten_on_request(name):
    module = make(name, stateful=True).eval()
    first, second = module(X[:3]), module(X[:3])
    assert not torch.equal(first, second)
    module.reset_state()
    assert torch.equal(module(X[:3]), first)


@pytest.mark.parametrize(
    "name",
    ["LIF", "IF", "BNTTLIF", "STDBLIF"],
)
def test_a_detached_state_truncates_the_gradient(name):
    module = make(name, stateful=True).eval()
    x = (1 + X).requires_grad_()
    module(x[:3])
    module.detach_state()
    module(x[3:]).sum().backward()
    assert (x.grad[:3] == 0).all() and (x.grad[3:] != 0).any()
    module.reset_state()
    module.detach_state()  # nothing to detach is fine


def train(module: torch_nn.Module, wanted: torch.Tensor, x: torch.Tensor = X, steps: int = 60) -> list[float]:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (module(x).mean(0) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "name, option",
    [("LIF", "learn_threshold"), ("LIF", "learn_leak"), ("BNTTLIF", "learn_threshold"), ("IF", "learn_threshold")],
)
@pytest.mark.parametrize("learn", [True, 3])
def test_leak_and_threshold_can_be_learnt(name, option, learn):
    torch.manual_seed(0)
    x = 0.4 + 0.5 * torch.randn(6, 200, 3)
    goal = make(name, surrogate="atan")
    leak, threshold = (0.5, 0.8) if option == "learn_leak" else (goal.leak, 0.4)
    given = dict(leak=leak, threshold=threshold)
    wanted = (
        (ops.bntt_lif(x, torch.ones(6, 3), **given) if name == "BNTTLIF" else ops.lif(x, **given))[0].mean(0).mean(0)
    )
    module = make(name, surrogate="atan", **{option: learn})
    parameter = module.get_parameter(option.removeprefix("learn_"))
    assert parameter.shape == (() if learn is True else (3,)) and parameter.requires_grad
    if name == "BNTTLIF":
        module.weight.requires_grad_(False)
    before = parameter.detach().clone()
    optimizer = torch.optim.Adam([parameter], lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(x).mean((0, 1)) - wanted).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    goal_value = leak if option == "learn_leak" else threshold
    assert losses[-1] < 0.2 * losses[0]
    assert ((parameter.detach() - goal_value).abs() < 0.5 * (before - goal_value).abs()).all()


def test_learnable_values_work_in_every_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        module = nn.LIF(learn_leak=True, learn_threshold=3)
        x = X.to(dtype).requires_grad_()
        module(x).sum().backward()
        assert module.leak.grad.dtype == torch.float32 and module.leak.grad != 0
        module = nn.LIF(learn_leak=True).to(dtype)
        module(x).sum().backward()
        assert module.leak.grad.dtype == dtype


@pytest.mark.parametrize("name", MODULES)
def test_double(name):
    module = make(name).double().eval()
    spikes = module(X.double())
    assert spikes.dtype == torch.float64
    assert (spikes == make(name).eval()(X)).float().mean() > 0.99


class TestBnttLif:
    def reference(self, dtype=torch.float64):
        norms = [torch_nn.BatchNorm2d(3, eps=1e-4, dtype=dtype) for _ in range(6)]
        for norm in norms:
            norm.bias = None
        return norms

    def test_running_statistics_are_those_of_a_batch_norm_a_step(self):
        norms, module = self.reference(), nn.BNTTLIF(3, 6).double()
        for seed in range(3):
            x = (
                1
                + seed
                + 2 * torch.randn(6, 4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            )
            y = torch.stack([norm(x[t]) for t, norm in enumerate(norms)])
            assert torch.equal(module(x), ops.lif(y, leak=0.95)[0])
        for t, norm in enumerate(norms):
            torch.testing.assert_close(module.running_mean[t], norm.running_mean, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(module.running_var[t], norm.running_var, rtol=1e-12, atol=1e-13)
        assert module.num_batches_tracked == norms[0].num_batches_tracked == 3
        assert not torch.allclose(module.running_var[0], module.running_var[1])
        # evaluation reads them and changes nothing
        module.eval(), [norm.eval() for norm in norms]
        kept = {k: v.clone() for k, v in module.state_dict().items()}
        y = torch.stack([norm(x[t]) for t, norm in enumerate(norms)])
        assert torch.equal(module(x), ops.lif(y, leak=0.95)[0])
        assert all(torch.equal(kept[k], v) for k, v in module.state_dict().items())

    def test_gradients_are_those_of_a_batch_norm_a_step(self):
        norms, module = self.reference(), nn.BNTTLIF(3, 6).double()
        x = 1 + torch.randn(6, 4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        grad = torch.randn(6, 4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        module(ours).backward(grad)
        ops.lif(torch.stack([norm(c) for norm, c in zip(norms, theirs.unbind(0), strict=True)]), leak=0.95)[0].backward(
            grad
        )
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            module.weight.grad, torch.stack([n.weight.grad for n in norms]), rtol=1e-9, atol=1e-11
        )

    def test_momentum(self):
        module = nn.BNTTLIF(3, 6, momentum=0.25)
        module(5 + X)
        torch.testing.assert_close(module.running_mean, 0.25 * (5 + X).mean((1, 3)))
        torch.testing.assert_close(module.running_var, 0.75 + 0.25 * X.var((1, 3)))

    def test_fewer_steps_use_and_update_the_first(self):
        module = nn.BNTTLIF(3, 6)
        module(5 + X[:2])
        assert (
            (module.running_mean[:2] != 0).all()
            and (module.running_mean[2:] == 0).all()
            and (module.running_var[2:] == 1).all()
        )
        module(5 + X[:2]).sum().backward()
        assert (module.weight.grad[2:] == 0).all() and (module.weight.grad[:2] != 0).any()
        module.eval()
        assert torch.equal(module(5 + X)[:2], module(5 + X[:2]))

    def test_more_steps_are_refused(self):
        for module in (nn.BNTTLIF(3, 5), nn.BNTTLIF(3, 5).eval()):
            with pytest.raises(ValueError, match="BNTTLIF: trained for 5 steps, got 6; later steps have no statistics"):
                module(X)

    def test_one_value_a_channel_is_refused_in_training(self):
        module = nn.BNTTLIF(3, 6)
        with pytest.raises(ValueError, match="BNTTLIF: training needs more than one value a channel and step, got 1"):
            module(torch.randn(6, 1, 3))
        assert module.num_batches_tracked == 0 and (module.running_mean == 0).all()
        assert module.eval()(torch.randn(6, 1, 3)).shape == (6, 1, 3)

    def test_wrong_channels_are_told(self):
        with pytest.raises(ValueError, match=r"bntt_lif: weight must have shape \[6, 4\], got \[6, 3\]"):
            nn.BNTTLIF(3, 6)(torch.randn(6, 2, 4))

    def test_statistics_are_updated_once_under_no_grad_too(self):
        module = nn.BNTTLIF(3, 6)
        with torch.no_grad():
            module(X)
        assert module.num_batches_tracked == 1 and not module.running_mean.requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_currents_keep_statistics_in_float32(self, dtype):
        module = nn.BNTTLIF(3, 6)
        assert module(X.to(dtype)).dtype == dtype
        assert module.running_mean.dtype == module.weight.dtype == torch.float32

    def test_it_is_compiled_without_breaks(self):
        torch._dynamo.reset()
        results = []
        for run in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, backend="aot_eager")):
            module = nn.BNTTLIF(3, 6, learn_leak=True)
            call, x = run(module), X.clone().requires_grad_()
            for _ in range(2):
                call(x).sum().backward()
            results.append(
                (
                    x.grad,
                    module.weight.grad,
                    module.leak.grad,
                    module.running_mean,
                    module.running_var,
                    module.num_batches_tracked,
                )
            )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert results[0][5] == 2


class TestStdbLif:
    def test_a_threshold_that_is_set_later_is_used(self):
        module = nn.STDBLIF(threshold=1.0)
        module(X)
        module.threshold.fill_(0.25)
        assert torch.equal(module(X), ops.stdb_lif(X, threshold=0.25)[0])
        module.threshold.mul_(2)
        assert torch.equal(module(X), ops.stdb_lif(X, threshold=0.5)[0])
        module.load_state_dict({"threshold": torch.tensor(0.125)})
        assert torch.equal(module(X), ops.stdb_lif(X, threshold=0.125)[0])
        module.threshold = torch.tensor(0.75)
        assert torch.equal(module(X), ops.stdb_lif(X, threshold=0.75)[0])

    def test_a_threshold_written_without_a_version_is_used(self):
        module = nn.STDBLIF(threshold=1.0)
        module(X)
        module.threshold.data.fill_(0.25)
        assert torch.equal(module(X), ops.stdb_lif(X, threshold=0.25)[0])

    def test_another_tensor_is_another_threshold(self):
        tensors = sorted((torch.tensor(1.0) for _ in range(200)), key=id)
        low, high = min(zip(tensors[:-1], tensors[1:], strict=True), key=lambda pair: id(pair[1]) - id(pair[0]))
        module = nn.STDBLIF()
        module.threshold = high
        module(X)
        for _ in range(id(high) - id(low)):
            low.fill_(0.25)
        module.threshold = low
        assert torch.equal(module(X), ops.stdb_lif(X, threshold=0.25)[0])

    def test_it_works_where_it_was_built_in_inference_mode(self):
        with torch.inference_mode():
            assert torch.equal(nn.STDBLIF(threshold=0.5)(X), ops.stdb_lif(X, threshold=0.5)[0])

    def test_it_works_in_inference_mode(self):
        module = nn.STDBLIF(threshold=0.5)
        with torch.inference_mode():
            assert torch.equal(module(X), ops.stdb_lif(X, threshold=0.5)[0])

    def test_a_threshold_of_zero_is_refused_by_name(self):
        module = nn.STDBLIF()
        module.threshold.zero_()
        with pytest.raises(ValueError, match="stdb_lif: threshold must be a finite number above 0, got 0.0"):
            module(X)

    def test_the_threshold_is_saved_and_is_no_parameter(self):
        module = nn.STDBLIF(threshold=4.26)
        assert list(module.state_dict()) == ["threshold"] and not list(module.parameters())
        other = nn.STDBLIF()
        other.load_state_dict(module.state_dict())
        assert torch.equal(other(9 * X), module(9 * X)) and "threshold=4.26" in repr(other)

    def test_it_is_compiled_once_without_breaks_for_every_threshold(self):
        torch._dynamo.reset()
        module, counter = nn.STDBLIF(threshold=0.5), CompileCounterWithBackend("aot_eager")
        compiled, seen = torch.compile(module, fullgraph=True, backend=counter), []
        for write in (
            lambda: None,
            lambda: module.threshold.fill_(0.25),
            lambda: module.threshold.data.fill_(0.75),
            lambda: module.load_state_dict({"threshold": torch.tensor(0.125)}),
        ):
            write()
            x = X.clone().requires_grad_()
            spikes = compiled(x)
            spikes.sum().backward()
            y = X.clone().requires_grad_()
            wanted = ops.stdb_lif(y, threshold=float(module.threshold))[0]
            wanted.sum().backward()
            assert torch.equal(spikes, wanted) and torch.equal(x.grad, y.grad)
            seen.append((float(spikes.detach().mean()), counter.frame_count))
        rates, graphs = zip(*seen, strict=True)
        assert len(set(rates)) == 4 and len(set(graphs)) == 1


@pytest.mark.parametrize("name", ["LIF", "IF"])
def test_lif_is_compiled_without_breaks(name):
    torch._dynamo.reset()
    module = make(name, learn_leak=True, learn_threshold=3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), module(X))


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles_are_independent_and_equal(name):
    module = make(name).train()
    module(X)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved(module)):
        assert repr(other) == repr(module)
        state, theirs = module.state_dict(), other.state_dict()
        assert state.keys() == theirs.keys() and all(torch.equal(state[k], theirs[k]) for k in state)
        assert torch.equal(other.eval()(X), copy.deepcopy(module).eval()(X))
        assert all(
            a.data_ptr() != b.data_ptr()
            for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
        )


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_with_state_can_be_copied(name):
    module = make(name, stateful=True).eval()
    with torch.no_grad():
        module(X[:3])
        other = copy.deepcopy(module)
        assert torch.equal(other(X[3:]), module(X[3:]))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved(m)])
def test_a_module_whose_state_has_a_history_is_copied_without_it(name, way):
    module, x = make(name, stateful=True).eval(), X.clone().requires_grad_()
    module(x[:3])
    other = way(module)
    assert module.membrane.requires_grad and not other.membrane.requires_grad
    assert torch.equal(other.membrane, module.membrane) and other.membrane.data_ptr() != module.membrane.data_ptr()
    spikes = module(x[3:])
    assert torch.equal(other(X[3:]), spikes)
    spikes.sum().backward()  # the history of the original is whole
    assert (x.grad[:3] != 0).any()


def test_state_dict_keys():
    assert list(nn.LIF().state_dict()) == []
    assert sorted(nn.LIF(learn_leak=True, learn_threshold=3).state_dict()) == ["leak", "threshold"]
    assert sorted(nn.BNTTLIF(3, 6).state_dict()) == ["num_batches_tracked", "running_mean", "running_var", "weight"]
    stateful = nn.LIF(stateful=True)
    stateful(X)
    assert list(stateful.state_dict()) == []


@pytest.mark.parametrize(
    "name",
    MODULES,
)
def test_meta(name):
    module = make(name).to("meta")
    repr(module)
    assert module(X.to("meta")).shape == X.shape


@pytest.mark.parametrize("module, text", [
    (nn.LIF(), "LIF(leak=0.95, threshold=1.0, reset=soft, detach_reset=True, surrogate=triangle, delay=False)"),
    (nn.IF(0.5, stateful=True), "IF(leak=1.0, threshold=0.5, reset=soft, detach_reset=True, surrogate=triangle, delay=False, stateful=True)"),
    (nn.LIF(learn_leak=True), "LIF(leak=learnable, threshold=1.0, reset=soft, detach_reset=True, surrogate=triangle, delay=False)"),
    (nn.BNTTLIF(3, 6), "BNTTLIF(3, steps=6, eps=0.0001, momentum=0.1, leak=0.95, threshold=1.0, reset=soft, detach_reset=True, surrogate=triangle)"),
    (nn.STDBLIF(0.9, 0.5), "STDBLIF(leak=0.9, threshold=0.5, alpha=0.3, beta=0.01, form=exact)"),
])  # fmt: skip
def test_repr(module, text):
    assert repr(module) == text


def test_errors_come_from_the_operators_by_name():
    with pytest.raises(ValueError, match="lif: reset must be one of soft, hard, none, got 'zero'"):
        nn.LIF(reset="zero")(X)
    with pytest.raises(TypeError, match="surogate"):
        nn.LIF(surogate="atan")
    module = nn.LIF(stateful=True)
    module(X)
    with pytest.raises(ValueError, match=r"lif: membrane must have shape \[2, 3, 5\], got \[4, 3, 5\]"):
        module(X[:, :2])
    with pytest.raises(ValueError, match=r"lif: leak must have shape \[3\], got \[4\]"):
        nn.LIF(learn_leak=4)(X)


@pytest.mark.slow
def test_under_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = torch_nn.Sequential(
            torch_nn.Linear(5, 5), nn.BNTTLIF(3, 6, learn_leak=True), nn.LIF(learn_threshold=True), nn.STDBLIF()
        )
        wrapped = torch_nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        for _ in range(2):
            plain(X).mean(-1).sum().backward(), wrapped(X).mean(-1).sum().backward()
        for (k, a), b in zip(plain.named_parameters(), wrapped.module.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=k)
        for a, b in zip(plain.buffers(), wrapped.module.buffers(), strict=True):
            assert torch.equal(a, b)
    finally:
        dist.destroy_process_group()
