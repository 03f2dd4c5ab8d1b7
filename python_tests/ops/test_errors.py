"""What each wrong argument is told: what was expected, what came, what to do."""

from __future__ import annotations

import pytest
import torch

from pyaccel import ops

X = torch.zeros(4, 2, 3)
W = torch.ones(4, 3)
META = dict(device="meta")


def lif(current=X, *rest, **options):
    return ops.lif(current, *rest, **options)


def bntt(current=X, weight=W, *rest, **options):
    return ops.bntt_lif(current, weight, *rest, **options)


def encode(image=torch.zeros(2, 3), steps=2, seed=0, **options):
    return ops.poisson_encode(image, steps, seed=seed, **options)


NAN, INF = float("nan"), float("inf")
LIF = [
    (dict(current=[[1.0]]), TypeError, "lif: current must be a torch.Tensor [T, ...], got a list"),
    (dict(current=X.int()), TypeError, "lif: current must be float32, bfloat16, float16 or float64, got torch.int32; convert it with .float()"),
    (dict(current=X.to(torch.complex64)), TypeError, "lif: current must be float32, bfloat16, float16 or float64, got torch.complex64"),
    (dict(current=torch.tensor(1.0)), ValueError, "lif: current must be [T, ...], got a 0-d tensor"),
    (dict(membrane=torch.zeros(2, 4)), ValueError, "lif: membrane must have shape [2, 3], got [2, 4]"),
    (dict(membrane=torch.zeros(4, 2, 3)), ValueError, "lif: membrane must have shape [2, 3], got [4, 2, 3]"),
    (dict(membrane=torch.zeros(2, 3).double()), TypeError, "lif: membrane must be torch.float32, got torch.float64; convert it with .to(torch.float32)"),
    (dict(current=X.bfloat16(), membrane=torch.zeros(2, 3).bfloat16()), TypeError, "lif: membrane must be torch.float32, got torch.bfloat16"),
    (dict(current=X.double(), membrane=torch.zeros(2, 3)), TypeError, "lif: membrane must be torch.float64, got torch.float32"),
    (dict(membrane=torch.zeros(2, 3, **META)), ValueError, "lif: membrane is on meta, the other tensors on cpu; move it with .to('cpu')"),
    (dict(membrane=0.0), TypeError, "lif: membrane must be a torch.Tensor, got a float"),
    (dict(leak=NAN), ValueError, "lif: leak must be a finite number, got nan"),
    (dict(leak=INF), ValueError, "lif: leak must be a finite number, got inf"),
    (dict(leak="0.9"), TypeError, "lif: leak must be a number, got str"),
    (dict(leak=None), TypeError, "lif: leak must be a number, got NoneType"),
    (dict(leak=True), TypeError, "lif: leak must be a number, got bool"),
    (dict(leak=torch.ones(2)), ValueError, "lif: leak must have shape [3], got [2]"),
    (dict(leak=torch.ones(3, 1)), ValueError, "lif: leak must have shape [3], got [3, 1]"),
    (dict(leak=torch.ones(3).double()), TypeError, "lif: leak must be torch.float32, got torch.float64"),
    (dict(leak=torch.ones(3, **META)), ValueError, "lif: leak is on meta, the other tensors on cpu"),
    (dict(current=X[0], leak=torch.ones(3)), ValueError, "lif: a leak of one value a channel needs current [T, B, C, ...], got [2, 3]"),
    (dict(current=X[0], threshold=torch.ones(3)), ValueError, "lif: a threshold of one value a channel needs current [T, B, C, ...], got [2, 3]"),
    (dict(threshold=0), ValueError, "lif: threshold must be a finite number above 0, got 0"),
    (dict(threshold=-1.0), ValueError, "lif: threshold must be a finite number above 0, got -1.0"),
    (dict(threshold=NAN), ValueError, "lif: threshold must be a finite number above 0, got nan"),
    (dict(threshold=INF), ValueError, "lif: threshold must be a finite number above 0, got inf"),
    (dict(threshold=torch.ones(1)), ValueError, "lif: threshold must have shape [3], got [1]"),
    (dict(threshold=torch.ones((), dtype=torch.int64)), TypeError, "lif: threshold must be torch.float32, got torch.int64"),
    (dict(reset="zero"), ValueError, "lif: reset must be one of soft, hard, none, got 'zero'"),
    (dict(reset=None), ValueError, "lif: reset must be one of soft, hard, none, got None"),
    (dict(surrogate="relu"), ValueError, "lif: surrogate must be one of triangle, rectangle, atan, sigmoid, fast_sigmoid, got 'relu'"),
    (dict(surrogate_scale=NAN), ValueError, "lif: surrogate_scale must be a finite number, got nan"),
    (dict(surrogate_scale="1"), TypeError, "lif: surrogate_scale must be a number, got str"),
    (dict(surrogate_width=0.0), ValueError, "lif: surrogate_width must be a finite number above 0, got 0.0"),
    (dict(surrogate_width=-1), ValueError, "lif: surrogate_width must be a finite number above 0, got -1"),
]  # fmt: skip
BNTT = [
    (dict(current=X[0]), ValueError, "bntt_lif: current must be [T, B, C, ...], got [2, 3]"),
    (dict(current=X.long()), TypeError, "bntt_lif: current must be float32, bfloat16, float16 or float64, got torch.int64"),
    (dict(weight=torch.ones(3)), ValueError, "bntt_lif: weight must have shape [4, 3], got [3]"),
    (dict(weight=torch.ones(3, 4)), ValueError, "bntt_lif: weight must have shape [4, 3], got [3, 4]"),
    (dict(weight=W.double()), TypeError, "bntt_lif: weight must be torch.float32, got torch.float64"),
    (dict(current=X.half(), weight=W.half()), TypeError, "bntt_lif: weight must be torch.float32, got torch.float16"),
    (dict(weight=None), TypeError, "bntt_lif: weight must be a torch.Tensor, got a NoneType"),
    (dict(weight=torch.ones(4, 3, **META)), ValueError, "bntt_lif: weight is on meta, the other tensors on cpu"),
    (dict(membrane=torch.zeros(3)), ValueError, "bntt_lif: membrane must have shape [2, 3], got [3]"),
    (dict(mean=W), ValueError, "bntt_lif: mean and var must be given together, or both left out for batch statistics"),
    (dict(var=W), ValueError, "bntt_lif: mean and var must be given together, or both left out for batch statistics"),
    (dict(mean=W, var=W[:1]), ValueError, "bntt_lif: var must have shape [4, 3], got [1, 3]"),
    (dict(mean=W.double(), var=W), TypeError, "bntt_lif: mean must be torch.float32, got torch.float64"),
    (dict(mean=W, var=0.5), TypeError, "bntt_lif: var must be a torch.Tensor, got a float"),
    (dict(mean=W.clone().requires_grad_(), var=W), ValueError, "bntt_lif: mean must not require grad: given statistics are constants; detach() it"),
    (dict(mean=W, var=W.clone().requires_grad_()), ValueError, "bntt_lif: var must not require grad"),
    (dict(eps=0.0), ValueError, "bntt_lif: eps must be a finite number above 0, got 0.0"),
    (dict(eps=None), TypeError, "bntt_lif: eps must be a number, got NoneType"),
    (dict(leak=NAN), ValueError, "bntt_lif: leak must be a finite number, got nan"),
    (dict(threshold=-0.5), ValueError, "bntt_lif: threshold must be a finite number above 0, got -0.5"),
    (dict(reset="Soft"), ValueError, "bntt_lif: reset must be one of soft, hard, none, got 'Soft'"),
    (dict(surrogate=0), ValueError, "bntt_lif: surrogate must be one of triangle, rectangle, atan, sigmoid, fast_sigmoid, got 0"),
]  # fmt: skip
ENCODE = [
    (dict(image=3), TypeError, "poisson_encode: image must be a torch.Tensor [B, ...], got a int"),
    (dict(image=torch.zeros(2, dtype=torch.uint8)), TypeError, "poisson_encode: image must be float32, bfloat16, float16 or float64, got torch.uint8"),
    (dict(image=torch.tensor(0.5)), ValueError, "poisson_encode: image must be [B, ...], got a 0-d tensor"),
    (dict(steps=-1), ValueError, "poisson_encode: steps must be in 0..65536, got -1"),
    (dict(steps=65_537), ValueError, "poisson_encode: steps must be in 0..65536, got 65537"),
    (dict(steps=2.0), TypeError, "poisson_encode: steps must be an integer, got float"),
    (dict(steps=True), TypeError, "poisson_encode: steps must be an integer, got bool"),
    (dict(steps=10, first_step=65_527), ValueError, "poisson_encode: first_step must be in 0..65526, got 65527"),
    (dict(first_step=-1), ValueError, "poisson_encode: first_step must be in 0..65534, got -1"),
    (dict(seed=1 << 64), ValueError, f"poisson_encode: seed must be in {-(1 << 63)}..{(1 << 64) - 1}, got {1 << 64}"),
    (dict(seed=0.5), TypeError, "poisson_encode: seed must be an integer, got float"),
    (dict(seed=None), TypeError, "poisson_encode: seed must be an integer, got NoneType"),
    (dict(stream=1 << 32), ValueError, f"poisson_encode: stream must be in 0..{(1 << 32) - 1}, got {1 << 32}"),
    (dict(stream=-1), ValueError, f"poisson_encode: stream must be in 0..{(1 << 32) - 1}, got -1"),
    (dict(seed=torch.tensor([1, 2])), ValueError, "poisson_encode: seed must have shape [3], got [2]"),
    (dict(seed=torch.tensor([1.0, 2.0, 3.0])), TypeError, "poisson_encode: seed must be torch.int64, got torch.float32"),
    (dict(seed=torch.zeros(3, dtype=torch.int64, **META)), ValueError, "poisson_encode: seed is on meta, the other tensors on cpu"),
    (dict(sample_ids=torch.arange(3)), ValueError, "poisson_encode: sample_ids must have shape [2], got [3]"),
    (dict(sample_ids=torch.arange(2).int()), TypeError, "poisson_encode: sample_ids must be torch.int64, got torch.int32"),
    (dict(sample_ids=[0, 1]), TypeError, "poisson_encode: sample_ids must be a torch.Tensor, got a list"),
    (dict(gain=0.0), ValueError, "poisson_encode: gain must be a finite number above 0, got 0.0"),
    (dict(gain=NAN), ValueError, "poisson_encode: gain must be a finite number above 0, got nan"),
    (dict(gain="1"), TypeError, "poisson_encode: gain must be a number, got str"),
]  # fmt: skip
ALL = [(call, *row) for call, rows in ((lif, LIF), (bntt, BNTT), (encode, ENCODE)) for row in rows]


@pytest.mark.parametrize("call, arguments, kind, text", ALL, ids=[f"{c.__name__}{i}" for i, (c, *_) in enumerate(ALL)])
def test_wrong_arguments(call, arguments, kind, text):
    with pytest.raises(kind) as caught:
        call(**arguments)
    assert text in str(caught.value)
    assert type(caught.value) is kind


@pytest.mark.parametrize("call", [lif, bntt, encode])
def test_the_same_calls_without_the_mistake_pass(call):
    call()


@pytest.mark.parametrize("call, name", [(lif, "leak"), (lif, "threshold"), (bntt, "eps"), (encode, "gain")])
def test_a_number_that_no_float_can_hold(call, name):
    with pytest.raises(ValueError, match=f"{name} must be a finite number"):
        call(**{name: 10**400})


def test_unknown_options_are_refused_and_required_ones_are_required():
    with pytest.raises(TypeError, match="surogate"):
        lif(surogate="atan")
    with pytest.raises(TypeError, match="seed"):
        ops.poisson_encode(torch.zeros(2, 3), 2)
    with pytest.raises(TypeError):
        ops.lif(X, None, 0.9)  # options are keywords: a positional leak would be taken for something else


def test_a_key_tensor_and_numbers_beside_it_contradict_each_other():
    key = torch.tensor([1, 2, 3])
    for extra in (dict(stream=5), dict(first_step=5)):
        with pytest.raises(ValueError, match="seed"):
            encode(seed=key, **extra)


def test_sparse_tensors_are_refused():
    with pytest.raises((TypeError, ValueError), match="lif: current"):
        lif(X.to_sparse())


class TestBindings:
    """The compiled functions trust no address: what the Python layer would never send is refused there too."""

    @pytest.fixture
    def native(self):
        extension = pytest.importorskip("pyaccel._C")
        return extension.neuron

    OPTIONS = (1.0, 1.0, 0, True, False, 0, 0.3, 1.0)

    def forward(self, native, **changes):
        arguments = dict(
            current=X, membrane=None, leak=None, threshold=None, options=self.OPTIONS, checkpoint_every=0, packed=False,
            spikes=torch.empty_like(X), membrane_out=torch.empty(2, 3), checkpoints=None,
        )  # fmt: skip
        native.lif_forward(**(arguments | changes))

    @pytest.mark.parametrize(
        "changes, text",
        [
            (dict(current=torch.zeros(4, 2, 6)[..., ::2]), "lif: current must be dense with time outermost"),
            (dict(current=X.int()), "lif: current must be a floating tensor"),
            (dict(spikes=torch.empty(3, 2, 3)), "lif: spikes must be of current's shape and strides, got float32 [3, 2, 3]"),
            (dict(spikes=torch.empty(4, 2, 3).double()), "lif: spikes must be float32, got float64"),
            (dict(spikes=None), "lif: spikes must be given, got None"),
            (dict(membrane_out=torch.empty(3, 2).T), "lif: membrane_out must be of the shape and strides of one step of current"),
            (dict(membrane=torch.zeros(2, 3).half()), "lif: membrane must be float32, got float16"),
            (dict(leak=torch.ones(5)), "lif: leak must be contiguous [3], got float32 [5]"),
            (dict(threshold=torch.ones(6)[::2]), "lif: threshold must be contiguous [3]"),
            (dict(checkpoint_every=2), "lif: checkpoints must be given, got None"),
            (dict(checkpoint_every=2, checkpoints=torch.empty(2, 6)), "lif: checkpoints must be contiguous [1, 6]"),
        ],
    )
    def test_lif_forward(self, native, changes, text):
        self.forward(native)
        with pytest.raises(ValueError) as caught:
            self.forward(native, **changes)
        assert text in str(caught.value)

    def test_what_is_no_tensor(self, native):
        with pytest.raises(TypeError, match="expected a torch.Tensor"):
            self.forward(native, current=[1.0])

    def test_encode(self, native):
        spikes = torch.empty(2, 2, 3)
        for bad, text in (
            (dict(spikes=torch.empty(2, 2, 4)), "poisson_encode: spikes must be"),
            (dict(sample_ids=torch.arange(3)), "poisson_encode: sample_ids must be contiguous [2]"),
            (dict(sample_ids=torch.zeros(2)), "poisson_encode: sample_ids must be int64"),
        ):
            arguments = dict(image=torch.zeros(2, 3), sample_ids=None, seed=0, stream=0, first_step=0, gain=1.0, spikes=spikes)
            native.encode(**arguments)
            with pytest.raises(ValueError) as caught:
                native.encode(**(arguments | bad))
            assert text in str(caught.value)
