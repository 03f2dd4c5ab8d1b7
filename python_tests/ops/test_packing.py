"""`pack_spikes`, `unpack_spikes` and the bit planes of every kind, against a packer in Python integers."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuron_cases import DTYPES, LAYOUTS, arrange, leaf

from pyaccel import extension, ops
from pyaccel.ops import packing

KINDS = {"binary": 1, "signed": 2, "pooled": 3, "pooled_signed": 4}
VALUES = {
    "binary": [0.0, 1.0],
    "signed": [-1.0, 0.0, 1.0],
    "pooled": [0.0, 0.25, 0.5, 0.75, 1.0],
    "pooled_signed": [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0],
}
SIZES = (0, 1, 7, 8, 9, 63, 64, 129, 4096, 4097, 9001)


def draw(kind: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.tensor(VALUES[kind], dtype=dtype)
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))]


def planes_by_hand(rows: list[list[float]], kind: str) -> list[list[list[int]]]:
    """Plane k: bit k of the code (pooled: 4 times the value), two's complement; element i in bit i % 8 of byte i // 8."""
    planes = KINDS[kind]
    packed = []
    for k in range(planes):
        plane = []
        for row in rows:
            held = [0] * ((len(row) + 7) // 8)
            for i, value in enumerate(row):
                code = int(value * (4 if planes >= 3 else 1)) % (1 << planes)
                held[i // 8] |= (code >> k & 1) << i % 8
            plane.append(held)
        packed.append(plane)
    return packed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_every_kind_is_packed_bit_by_bit_and_comes_back(kind, n, dtype):
    rows = draw(kind, 3, n, dtype=dtype)
    packed = packing.pack("test", rows, kind)
    assert packed.dtype == torch.uint8 and packed.shape == (KINDS[kind], 3, (n + 7) // 8)
    assert packed.tolist() == planes_by_hand(rows.tolist(), kind)
    back = packing.unpack(packed, kind, packing.layout_of(rows))
    assert back.dtype == dtype and torch.equal(back, rows)


def test_a_known_row():
    spikes = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0, 0, 1.0], [0, 1.0, 1.0, 0, 0, 0, 0, 1.0, 1.0, 0]])
    assert ops.pack_spikes(spikes).tolist() == [[0b1, 0b10], [0b10000110, 0b1]]
    assert packing.pack("test", torch.tensor([[-1.0, 1.0, 0.0]]), "signed").tolist() == [[[0b011]], [[0b001]]]
    assert packing.pack("test", torch.tensor([[0.25, 1.0, 0.75]]), "pooled").tolist() == [
        [[0b101]],
        [[0b100]],
        [[0b010]],
    ]
    assert packing.pack("test", torch.tensor([[-0.25, 0.5]]), "pooled_signed").tolist() == [
        [[0b01]],
        [[0b11]],
        [[0b01]],
        [[0b01]],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [(), (7,), (129,), (2, 3, 5, 7), (4, 64, 1, 1)])
def test_spikes_of_any_layout_are_packed_in_logical_order(step, layout, dtype):
    spikes = arrange(draw("binary", 5, *step, dtype=dtype), layout)
    packed = ops.pack_spikes(spikes)
    assert packed.tolist() == planes_by_hand(spikes.reshape(5, -1).tolist(), "binary")[0]
    back = ops.unpack_spikes(packed, spikes.shape, dtype)
    assert torch.equal(back, spikes) and back.is_contiguous()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(list(KINDS)), shape=st.lists(st.integers(0, 12), min_size=2, max_size=4), dtype=st.sampled_from(DTYPES),
    last=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_planes_keep_memory_order(kind, shape, dtype, last, seed):
    spikes = draw(kind, *shape, dtype=dtype, seed=seed)
    if last and len(shape) == 4 and spikes.numel():  # a test of its own
        spikes = spikes.contiguous(memory_format=torch.channels_last)
    back = packing.unpack(packing.pack("test", spikes, kind), kind, packing.layout_of(spikes))
    assert back.stride() == spikes.stride() and torch.equal(back, spikes)


BAD = {
    "binary": [-1.0, 0.5, 2.0, 1.0000001, -1e-30, float("nan"), float("inf"), -float("inf")],
    "signed": [0.5, 2.0, -3.0, 1e-38, float("nan"), float("inf"), -float("inf")],
    "pooled": [-0.25, 0.125, 2.0, 0.2500001, float("nan"), float("inf")],
    "pooled_signed": [0.125, 2.0, -2.25, 3e38, float("nan"), -float("inf")],
}


@pytest.mark.parametrize("kind, value", [(k, v) for k, values in BAD.items() for v in values])
@pytest.mark.parametrize("where", [0, 70, 128])  # in a vector, and in the tail
def test_values_that_a_kind_cannot_store_are_refused(kind, value, where):
    spikes = draw(kind, 2, 129)
    packing.pack("spike_conv2d", spikes, kind)
    spikes[1, where] = value
    with pytest.raises(
        ValueError, match=f"spike_conv2d: the spikes hold values that kind='{kind}' cannot store; kinds are binary"
    ):
        packing.pack("spike_conv2d", spikes, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_check_holds_in_every_dtype(kind, dtype):
    every = torch.arange(-24, 25, dtype=torch.float64) / 8
    for value in every.tolist():
        spikes = torch.zeros(1, 40, dtype=dtype)
        spikes[0, 17] = value
        try:
            packed = packing.pack("test", spikes, kind)
        except ValueError:
            assert value not in VALUES[kind]
        else:
            assert torch.equal(packing.unpack(packed, kind, packing.layout_of(spikes)), spikes)


def test_negative_zero_comes_back_as_zero():
    spikes = torch.tensor([[-0.0, 1.0]])
    assert torch.equal(ops.unpack_spikes(ops.pack_spikes(spikes), (1, 2)), spikes)


def test_pack_spikes_takes_no_gradient_and_leaves_its_input_alone():
    spikes = draw("binary", 4, 33)
    kept = spikes.clone()
    packed = ops.pack_spikes(leaf(spikes))
    assert not packed.requires_grad and torch.equal(spikes, kept)
    assert not ops.unpack_spikes(packed, (4, 33)).requires_grad


@pytest.mark.parametrize("make", [lambda x: ops.pack_spikes(x), lambda x: ops.lif(x, packed=True)[0]])
def test_no_steps_come_back(make):
    x = torch.zeros(0, 9)
    assert ops.unpack_spikes(make(x), x.shape).shape == (0, 9)


def test_steps_without_neurons_come_back():
    packed = ops.pack_spikes(torch.zeros(5, 0, 3))
    assert packed.shape == (5, 0) and ops.unpack_spikes(packed, (5, 0, 3)).shape == (5, 0, 3)


@pytest.mark.parametrize(
    "spikes", [torch.zeros(5, 0, 6)[..., ::2], torch.zeros(3, 0, 4, 4).contiguous(memory_format=torch.channels_last)]
)
def test_steps_without_neurons_come_back_in_every_layout(spikes):
    assert ops.pack_spikes(spikes).shape == (len(spikes), 0)


P = torch.zeros(4, 2, dtype=torch.uint8)


@pytest.mark.parametrize("call, kind, text", [
    (lambda: ops.pack_spikes([1.0]), TypeError, "pack_spikes: spikes must be a torch.Tensor [T, ...], got a list"),
    (lambda: ops.pack_spikes(torch.zeros(2, 3).bool()), TypeError, "pack_spikes: spikes must be float32, bfloat16, float16 or float64, got torch.bool"),
    (lambda: ops.pack_spikes(torch.tensor(1.0)), ValueError, "pack_spikes: spikes must be [T, ...], got a 0-d tensor"),
    (lambda: ops.pack_spikes(torch.full((2, 3), 0.5)), ValueError, "pack_spikes: the spikes hold values that kind='binary' cannot store"),
    (lambda: ops.unpack_spikes([0], (4, 9)), TypeError, "unpack_spikes: packed must be a torch.Tensor, got a list"),
    (lambda: ops.unpack_spikes(P, (4, 17)), ValueError, "unpack_spikes: packed must have shape [4, 3], got [4, 2]"),
    (lambda: ops.unpack_spikes(P, (3, 9)), ValueError, "unpack_spikes: packed must have shape [3, 2], got [4, 2]"),
    (lambda: ops.unpack_spikes(P.int(), (4, 9)), TypeError, "unpack_spikes: packed must be torch.uint8, got torch.int32"),
    (lambda: ops.unpack_spikes(P, ()), ValueError, "unpack_spikes: shape must be [T, ...] and dtype floating, got [] and torch.float32"),
    (lambda: ops.unpack_spikes(P, (4, 9), torch.int8), ValueError, "unpack_spikes: shape must be [T, ...] and dtype floating, got [4, 9] and torch.int8"),
])  # fmt: skip
def test_wrong_arguments(call, kind, text):
    with pytest.raises(kind) as caught:
        call()
    assert text in str(caught.value) and type(caught.value) is kind


def test_packed_bits_of_any_layout_are_read():
    spikes = draw("binary", 4, 30)
    packed = ops.pack_spikes(spikes)
    wide = torch.full((4, 8), 255, dtype=torch.uint8)
    wide[:, ::2] = packed
    assert torch.equal(ops.unpack_spikes(wide[:, ::2], (4, 30)), spikes)
    assert torch.equal(ops.unpack_spikes(packed.T.contiguous().T, (4, 30)), spikes)


def test_padding_bits_are_zero_and_are_not_read():
    spikes = torch.ones(2, 9)
    packed = ops.pack_spikes(spikes)
    assert packed.tolist() == [[255, 1], [255, 1]]
    packed[:, 1] |= 0b11111110
    assert torch.equal(ops.unpack_spikes(packed, (2, 9)), spikes)


pack, unpack, lif_packed, bntt_packed = (
    getattr(torch.ops.pyaccel, name).default
    for name in ("pack_spikes", "unpack_spikes", "lif_packed", "bntt_lif_packed")
)
NEURON = [0.9, 0.8, 0.0, 1.0, 0.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 1, 129])
def test_opcheck_planes(kind, n):
    planes, spikes = KINDS[kind], draw(kind, 3, n)
    torch.library.opcheck(pack, (spikes, planes))
    torch.library.opcheck(unpack, (pack(spikes, planes)[0], planes, [3, n], [n, 1], torch.float32))


@pytest.mark.parametrize("last", [False, True])
def test_opcheck_packed_neurons(last):
    x = arrange(torch.randn(3, 2, 4, 3, 3), "channels_last" if last else "contiguous")
    v, channel = torch.randn(2, 4, 3, 3), torch.rand(4) + 0.5
    torch.library.opcheck(lif_packed, (x, v, channel, None, NEURON))
    torch.library.opcheck(lif_packed, (x, None, None, None, NEURON))
    weight = torch.rand(3, 4) + 0.5
    torch.library.opcheck(bntt_packed, (x, weight, v, weight - 0.5, weight, channel, channel, NEURON, 1e-4))
    torch.library.opcheck(bntt_packed, (x, weight, None, None, None, None, None, NEURON, 1e-4))


def test_compiles_without_breaks():
    torch._dynamo.reset()

    def model(x):
        packed, v = ops.lif(x, packed=True)
        return ops.unpack_spikes(packed, x.shape) + ops.unpack_spikes(ops.pack_spikes(ops.lif(x)[0]), x.shape), v

    x = torch.randn(4, 3, 30)
    with torch.no_grad():
        for a, b in zip(model(x), torch.compile(model, fullgraph=True, backend="aot_eager")(x), strict=True):
            assert torch.equal(a, b)


def test_meta_tensors_give_shapes():
    packed = ops.pack_spikes(torch.empty(6, 2, 9, device="meta"))
    assert packed.is_meta and packed.shape == (6, 3) and packed.dtype == torch.uint8
    assert ops.unpack_spikes(packed, (6, 2, 9), torch.float16).shape == (6, 2, 9)


def test_fake_tensors_give_shapes():
    with torch._subclasses.FakeTensorMode():
        assert ops.pack_spikes(torch.empty(6, 2, 9)).shape == (6, 3)


@pytest.mark.skipif(extension._C is None, reason="no compiled module")
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree(dtype):
    order, info = ("baseline", "avx2", "avx512"), extension._C.build_info()
    for level in order[: order.index(info["best_isa"]) + 1]:
        extension._C.force_isa(level)
        try:
            for kind in KINDS:
                for n in (1, 7, 129, 4099):
                    rows = draw(kind, 2, n, dtype=dtype)
                    packed = packing.pack("test", rows, kind)
                    assert packed.tolist() == planes_by_hand(rows.tolist(), kind)
                    assert torch.equal(packing.unpack(packed, kind, packing.layout_of(rows)), rows)
                    rows[1, -1] = 0.125
                    with pytest.raises(ValueError, match="cannot store"):
                        packing.pack("test", rows, kind)
        finally:
            extension._C.force_isa(info["isa"])


def test_the_number_of_threads_changes_nothing():
    rows, results = draw("pooled_signed", 5, 300_001), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        packed = packing.pack("test", rows, "pooled_signed")
        results.append(packed)
        assert torch.equal(packing.unpack(packed, "pooled_signed", packing.layout_of(rows)), rows)
        for where in ((0, 0), (4, 300_000)):
            broken = rows.clone()
            broken[where] = 0.1
            with pytest.raises(ValueError, match="cannot store"):
                packing.pack("test", broken, "pooled_signed")
    assert torch.equal(*results)


@pytest.mark.skipif(extension._C is None, reason="no compiled module")
@pytest.mark.parametrize("changes, text", [
    (dict(packed=torch.zeros(1, 2, 1, dtype=torch.uint8)), "pack_spikes: packed must be contiguous [1, 2, 2]"),
    (dict(packed=torch.zeros(1, 2, 2)), "pack_spikes: packed must be uint8"),
    (dict(spikes=torch.zeros(2, 18)[:, ::2]), "pack_spikes: spikes must be"),
    (dict(planes=5), "pack_spikes: "),
    (dict(planes=0), "pack_spikes: "),
])  # fmt: skip
def test_the_compiled_function_trusts_no_address(changes, text):
    arguments = dict(spikes=torch.zeros(2, 9), packed=torch.zeros(1, 2, 2, dtype=torch.uint8), planes=1)
    assert extension._C.neuron.pack(**arguments)
    with pytest.raises(ValueError) as caught:
        extension._C.neuron.pack(**(arguments | changes))
    assert text in str(caught.value)


FALLBACK = """
import json, sys, warnings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "pyaccel._C":
            raise ImportError("blocked for the test")

sys.meta_path.insert(0, Blocked())
warnings.simplefilter("ignore")
import torch
from pyaccel import extension, ops
from pyaccel.ops import packing

assert extension._C is None
out = {}
values = torch.arange(-4, 5) / 4
for kind, keep in (("binary", (0, 1)), ("signed", (-1, 0, 1)), ("pooled", (0, .25, .5, .75, 1)), ("pooled_signed", values.tolist())):
    allowed = torch.tensor(keep, dtype=torch.float32)
    rows = allowed[torch.arange(2 * 77).reshape(2, 77) * 7 % len(allowed)]
    packed = packing.pack("test", rows, kind)
    out[kind] = dict(rows=rows.tolist(), packed=packed.tolist(), back=torch.equal(packing.unpack(packed, kind, packing.layout_of(rows)), rows))
    refused = []
    for bad in (0.125, float("nan"), 2.0):
        rows[1, 76] = bad
        try:
            packing.pack("test", rows, kind)
        except ValueError:
            refused.append(bad)
    out[kind]["refused"] = len(refused)
image = torch.ones(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
image[0, 1, 2, 3] = 0
out["last"] = torch.equal(packing.unpack(packing.pack("test", image, "binary"), "binary", packing.layout_of(image)), image)
x = torch.randn(3, 2, 4, 3, 3)
bits, v = ops.lif(x, packed=True)
s, w = ops.lif(x)
out["lif"] = torch.equal(ops.unpack_spikes(bits, s.shape), s) and torch.equal(v, w)
weight = torch.ones(3, 4)
bits, v, *_ = ops.bntt_lif(x, weight, packed=True)
s, w, *_ = ops.bntt_lif(x, weight)
out["bntt"] = torch.equal(ops.unpack_spikes(bits, s.shape), s) and torch.equal(v, w)
empty = []
for make in (lambda: ops.pack_spikes(torch.zeros(0, 9)), lambda: ops.lif(torch.zeros(0, 9), packed=True), lambda: ops.pack_spikes(torch.zeros(3, 0))):
    try:
        make()
    except Exception as error:
        empty.append(f"{type(error).__name__} {error}")
out["empty"] = empty
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def fallback(run_python):
    done = run_python(FALLBACK)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_the_compiled_module_the_bits_are_the_same(fallback):
    for kind in KINDS:
        found = fallback[kind]
        assert found["packed"] == planes_by_hand(found["rows"], kind) and found["back"] and found["refused"] == 3
    assert fallback["last"] and fallback["lif"] and fallback["bntt"]


def test_nothing_to_pack_without_the_compiled_module(fallback):
    assert fallback["empty"] == []
