"""`flip_bits`, `flip_bits_`, `sram_noise` against their twins, bit for bit, on every instruction set of this machine."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyaccel import extension, ops, reference
from pyaccel.hardware import SramConfig
from pyaccel.reference import sram

pytestmark = pytest.mark.skipif(extension._C is None, reason="needs the compiled module")
SEED, STREAM = 0x123456789ABCDEF0, 7
DTYPES = {8: (torch.uint8, torch.int8), 16: (torch.int16,), 32: (torch.int32,)}
WIDTHS = [(w, dtype) for bits, dtypes in DTYPES.items() for dtype in dtypes for w in sram.WORD_BITS if w <= bits]
LEVELS = ["baseline", "avx2", "avx512"]


@pytest.fixture(params=LEVELS)
def level(request):
    """Every instruction set that this processor has."""
    info = extension._C.build_info()
    if LEVELS.index(request.param) > LEVELS.index(info["best_isa"]):
        pytest.skip(f"this processor has no {request.param}")
    extension._C.force_isa(request.param)
    yield request.param
    extension._C.force_isa(info["isa"])


def random_words(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, (n,), generator=generator).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} words differ"


def test_philox_known_answers(level):
    ones = (1 << 64) - 1
    cases = [
        ((0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((-1, -1, 0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x299F31D0A4093822 & ones, 0x85A308D3243F6A88 - (1 << 64), 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for (key, counter, stream, domain), expected in cases:
        out = torch.empty(1, 4, dtype=torch.int32)
        extension._C.sram.raw_philox(key, counter, stream, domain, 1, out)
        assert tuple(w & 0xFFFFFFFF for w in out[0].tolist()) == expected


def test_the_fast_generator_draws_what_the_plain_one_draws(level):
    blocks, first = 96 * 16, (1 << 32) - 96 * 16  # no run of the fast form crosses 2^32 here
    out = torch.empty(blocks, 4, dtype=torch.int32)
    extension._C.sram.raw_philox(SEED, first, 5, 0, blocks, out)
    words = reference.philox(SEED, torch.arange(first, first + blocks) & 0xFFFFFFFF, 0, 5, 0)
    assert torch.equal(out.to(torch.int64) & 0xFFFFFFFF, words)
    folded = [0, 0, 0, 0]
    for row in words.tolist():
        folded = [f ^ w for f, w in zip(folded, row, strict=True)]
    assert list(extension._C.sram.raw_philox(SEED, first, 5, 0, blocks, None)) == folded


@pytest.mark.parametrize("semantics", sram.SEMANTICS)
@pytest.mark.parametrize("mode", sram.MODES)
def test_every_width_against_the_twin(level, mode, semantics):
    for number, (width, dtype) in enumerate(WIDTHS):
        words = random_words(4099 + 1000 * number, dtype)
        p = [0.3 / (1 + b) for b in range(width - 1)] + [0.01]
        options = dict(word_bits=width, seed=SEED + number, stream=STREAM, mode=mode, semantics=semantics)
        options["first_element"] = 8 * number * 1001
        expected = reference.flip_bits(words, p, **options)
        same(ops.flip_bits(words, p, **options), expected)
        again = words.clone()
        assert ops.flip_bits_(again, p, **options) is again
        same(again, expected)


EDGES = [0.0, 1.0, 2.0**-8, 2.0**-33, 0.9999, 1e-9, 1 - 2.0**-32, 0.5, 1 / 32, 1e-3, 1e-4, 0.0307]


@pytest.mark.parametrize("mode", sram.MODES)
def test_probabilities_at_the_edges(level, mode):
    words = random_words(20_001, torch.int8)
    for p in (EDGES[:8], EDGES[4:], [1.0] * 8, [0.0] * 8, [0.0] * 7 + [1.0]):
        for semantics in sram.SEMANTICS:
            options = dict(seed=-3, stream=0xFFFFFFFF, mode=mode, semantics=semantics)
            same(ops.flip_bits(words, p, **options), reference.flip_bits(words, p, **options))


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 129, 4095, 4097])
def test_odd_sizes(level, size):
    for mode in sram.MODES:
        for width, dtype in ((1, torch.uint8), (4, torch.uint8), (8, torch.int8), (16, torch.int16), (32, torch.int32)):
            words = random_words(size, dtype)
            options = dict(word_bits=width, seed=9, stream=2, mode=mode, first_element=3)
            same(ops.flip_bits(words, 0.02, **options), reference.flip_bits(words, 0.02, **options))


@pytest.mark.parametrize("mode", sram.MODES)
def test_indices_beyond_32_bits(level, mode):
    words = random_words(3000, torch.uint8)
    for width in (1, 8):
        # bit 2^36 is where the dense counter's upper half changes; block 2^32 of 64 words is where the sparse one's does
        for first in ((1 << 36) // width - 1600, (1 << 38) - 1600, 1 << 50):
            options = dict(word_bits=width, seed=SEED, stream=1, mode=mode, first_element=first)
            same(ops.flip_bits(words, 0.04, **options), reference.flip_bits(words, 0.04, **options))


def test_first_words_inside_a_byte(level):
    words = random_words(700, torch.uint8)
    for width in (1, 2, 4):
        for first in (1, 3, 7, 13, 8191):
            for mode in sram.MODES:
                options = dict(word_bits=width, seed=4, mode=mode, first_element=first, semantics="stuck")
                same(ops.flip_bits(words, 0.3, **options), reference.flip_bits(words, 0.3, **options))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_split_gives_the_same_bits(data):
    width, dtype = data.draw(st.sampled_from(WIDTHS))
    n = data.draw(st.integers(0, 9000))
    words = random_words(n, dtype, data.draw(st.integers(0, 99)))
    cut = data.draw(st.integers(0, n))
    p = data.draw(st.sampled_from([0.0, 1e-3, 0.02, 0.2, 1.0]))
    options = dict(word_bits=width, seed=data.draw(st.integers(-(1 << 63), (1 << 64) - 1)), stream=data.draw(st.integers(0, 99)))
    options |= dict(mode=data.draw(st.sampled_from(sram.MODES)), semantics=data.draw(st.sampled_from(sram.SEMANTICS)))
    whole = ops.flip_bits(words, p, **options)
    per_element = sram.DTYPE_BITS[dtype] // width
    parts = [
        ops.flip_bits(words[:cut], p, **options),
        ops.flip_bits(words[cut:], p, first_element=cut * per_element, **options),
    ]
    same(torch.cat(parts), whole)


def test_threads_do_not_matter(level):
    words = random_words(1 << 20, torch.int8)
    for mode, p in (("dense", 0.1), ("sparse", 0.01)):
        options = dict(seed=5, mode=mode)
        torch.set_num_threads(1)
        single = ops.flip_bits(words, p, **options)
        torch.set_num_threads(3)
        same(ops.flip_bits(words, p, **options), single)


def test_logical_order_not_memory_order():
    words = random_words(2 * 3 * 5 * 7, torch.int8).reshape(2, 3, 5, 7)
    expected = ops.flip_bits(words, 0.2, seed=1)
    channels_last = words.contiguous(memory_format=torch.channels_last)
    got = ops.flip_bits(channels_last, 0.2, seed=1)
    same(got, expected)
    assert got.is_contiguous(memory_format=torch.channels_last)
    in_place = channels_last.clone(memory_format=torch.preserve_format)
    same(ops.flip_bits_(in_place, 0.2, seed=1), expected)
    strided = torch.zeros(2, 3, 5, 14, dtype=torch.int8)[..., ::2]
    strided.copy_(words)
    same(ops.flip_bits_(strided, 0.2, seed=1), expected)


@pytest.mark.parametrize("mode", sram.MODES)
def test_statistics_over_a_million_words(mode):
    n = 1 << 20
    for p in (0.2, 0.01, 1e-3):
        masks = ops.flip_bits(torch.zeros(n, dtype=torch.uint8), p, seed=11, stream=3, mode=mode)
        planes = torch.stack([(masks >> b) & 1 for b in range(8)]).double()
        counts = planes.sum(1)
        assert ((counts - n * p).abs() < 4.5 * math.sqrt(n * p * (1 - p))).all(), counts
        centred = (planes - p) / math.sqrt(p * (1 - p))
        correlation = centred @ centred.T / n - torch.eye(8)
        correlation.fill_diagonal_(0)
        assert correlation.abs().max() < 5 / math.sqrt(n)
        lagged = (centred[:, 1:] * centred[:, :-1]).mean(1)
        assert lagged.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("mode", sram.MODES)
def test_error_magnitude_over_a_million_uniform_words(mode):
    codes = random_words(1 << 20, torch.uint8)
    for n8t, p in ((4, 0.01), (0, 0.05)):
        bank = SramConfig(8, n8t=n8t, p6=p)
        delta = ops.flip_bits(codes, bank.probabilities, seed=2, mode=mode).double() - codes.double()
        assert delta.abs().max() <= bank.bound
        assert float(delta.abs().mean()) == pytest.approx(bank.mean_error_lsb, rel=0.01)
        assert float(delta.square().mean().sqrt()) == pytest.approx(bank.rms_lsb, rel=0.01)


def test_words_of_8t_cells_alone_never_fail():
    codes = random_words(1 << 12, torch.uint8)
    for mode in sram.MODES:
        same(ops.flip_bits(codes, SramConfig(8, n8t=8, p6=0.5).probabilities, seed=2, mode=mode), codes)
        low = ops.flip_bits(codes, SramConfig(8, n8t=4, p6=0.5).probabilities, seed=2, mode=mode)
        assert (low.int() - codes.int()).abs().max() == 15 and not ((low ^ codes) >> 4).any()


def test_dense_is_nested_and_sparse_is_not_promised_to_be():
    zeros = torch.zeros(1 << 16, dtype=torch.uint8)
    last = torch.zeros_like(zeros)
    for p in (1e-4, 1e-3, 0.03, 0.2, 0.7, 1.0):
        masks = ops.flip_bits(zeros, p, seed=3)
        assert not (last & ~masks).any()
        last = masks
    assert (last == 255).all()


def test_involution_identity_and_certainty():
    words = random_words(5000, torch.int16)
    for mode in sram.MODES:
        options = dict(seed=1, stream=4, mode=mode)
        once = ops.flip_bits(words, 0.03, **options)
        assert not torch.equal(once, words)
        same(ops.flip_bits(once, 0.03, **options), words)
        same(ops.flip_bits(words, 0.0, **options), words)
        for b in (0, 9, 15):
            certain = [0.0] * 16
            certain[b] = 1.0
            same(ops.flip_bits(words, certain, **options), words ^ torch.tensor(1 << b).to(torch.int16))


@pytest.mark.parametrize("mode", sram.MODES)
def test_stuck_cells_flip_half_as_often(mode):
    words, p = random_words(1 << 20, torch.uint8), 0.02
    n = 8 << 20
    for semantics, rate in (("flip", p), ("stuck", p / 2)):
        changed = words ^ ops.flip_bits(words, p, seed=1, mode=mode, semantics=semantics)
        flips = sum(int(((changed >> b) & 1).sum()) for b in range(8))
        assert abs(flips - n * rate) < 4.5 * math.sqrt(n * rate * (1 - rate))
    stuck = ops.flip_bits(words, p, seed=1, mode=mode, semantics="stuck")
    same(ops.flip_bits(stuck, p, seed=1, mode=mode, semantics="stuck"), stuck)  # reading again changes nothing


def test_words_are_independent_of_packing():
    memory = random_words(4096, torch.uint8)
    for mode in sram.MODES:
        options = dict(word_bits=8, seed=8, mode=mode)
        expected = ops.flip_bits(memory, 0.01, **options)
        for dtype in (torch.int8, torch.int16, torch.int32):
            same(ops.flip_bits(memory.view(dtype), 0.01, **options).view(torch.uint8), expected)


# ---- sram_noise

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", sram.MODES)
def test_noise_against_the_twin(level, mode, dtype):
    generator = torch.Generator().manual_seed(1)
    for number, (width, signed) in enumerate([(1, False), (2, True), (2, False), (4, True), (4, False), (8, True), (8, False), (16, True), (16, False)]):
        top = sram.code_range(width, signed)[1]
        x = (torch.randn(9001 + number, generator=generator) * 3).to(dtype)
        x[:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], dtype=dtype)
        scale = 6.0 / top
        options = dict(word_bits=width, signed=signed, seed=number, stream=3, mode=mode, first_element=37 * number)
        expected = reference.sram_noise(x, scale, 0.03, **options)
        same(ops.sram_noise(x, scale, 0.03, **options), expected)
        step = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        same(ops.sram_noise(x, step, 0.03, **options), expected)


def test_noise_is_quantise_flip_dequantise():
    x = torch.randn(4000)
    codes = torch.round(x / 0.02).clamp(-127, 127).to(torch.int8)
    expected = ops.flip_bits(codes, 0.05, seed=3, stream=9, first_element=5).float() * 0.02
    same(ops.sram_noise(x, 0.02, 0.05, signed=True, seed=3, stream=9, first_element=5), expected)


def test_sign_extension_of_narrow_words():
    x = torch.tensor([-1.0, -3.0, 2.0, 0.0])
    assert ops.sram_noise(x, 1.0, 0.0, word_bits=4, signed=True, seed=0).tolist() == [-1, -3, 2, 0]
    flipped = ops.sram_noise(x, 1.0, [0, 0, 0, 1.0], word_bits=4, signed=True, seed=0)
    assert flipped.tolist() == [7, 5, -6, -8]
    assert ops.sram_noise(x, 1.0, [1.0, 0], word_bits=2, signed=True, seed=0).tolist() == [-2, -2, 0, 1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_straight_through_gradient(level, dtype):
    for width, signed in ((8, True), (8, False), (4, True)):
        low, high = sram.code_range(width, signed)
        x = torch.cat([torch.linspace(low - 3.0, high + 3.0, 1003), torch.tensor([float("nan"), -0.5, high + 0.5])]).to(dtype)
        results = []
        for function in (ops.sram_noise, reference.sram_noise):
            leaf = x.clone().requires_grad_()
            weight = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).to(dtype)
            function(leaf, 1.0, 0.1, word_bits=width, signed=signed, seed=2).backward(weight)
            results.append(leaf.grad)
        same(*results)
        nearest = torch.round(x.double()).nan_to_num(0.0)
        same(results[0], torch.where((nearest >= low) & (nearest <= high), weight, torch.zeros_like(weight)))


def test_noise_of_any_layout():
    x = torch.rand(2, 3, 5, 7)
    expected = ops.sram_noise(x, 0.02, 0.1, signed=True, seed=1)
    leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    got = ops.sram_noise(leaf, 0.02, 0.1, signed=True, seed=1)
    same(got.detach(), expected)
    assert got.is_contiguous(memory_format=torch.channels_last)
    got.sum().backward()
    same(leaf.grad, torch.ones_like(x))


def test_double_backward_is_refused():
    x = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.sram_noise(x, 0.1, 0.1, signed=True, seed=1).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="sram_noise_backward"):
        grad.sum().backward()


# ---- registration

KEY = torch.tensor([5, 6, 7])


@pytest.mark.parametrize("sparse", [False, True])
def test_opcheck(sparse):
    words, x = random_words(50, torch.int8), torch.randn(50, requires_grad=True)
    torch.library.opcheck(torch.ops.pyaccel.flip_bits.default, (words, KEY, [0.1] * 4, 4, sparse, False))
    torch.library.opcheck(torch.ops.pyaccel.flip_bits_.default, (words, KEY, [0.1] * 4, 4, sparse, True))
    torch.library.opcheck(torch.ops.pyaccel.sram_noise.default, (x, None, KEY, 0.1, [0.1] * 8, 8, True, sparse))
    torch.library.opcheck(torch.ops.pyaccel.sram_noise.default, (x, torch.tensor(0.1), KEY, 1.0, [0.1] * 8, 8, False, sparse))


def test_a_key_tensor_keeps_one_graph():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, key: ops.sram_noise(x, 0.1, 0.1, signed=True, seed=key) + 1, backend=backend, fullgraph=True)
    x = torch.randn(100)
    for stream in range(3):
        key = torch.tensor([1, stream, 0])
        same(compiled(x, key), ops.sram_noise(x, 0.1, 0.1, signed=True, seed=1, stream=stream) + 1)
    assert len(graphs) == 1


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(100, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.sram_noise(x, 0.1, 0.1, signed=True, seed=1).sum().backward()
    assert counter.get_total_flops() == 100 * (5 + 4)


def test_without_a_kernel_the_twin_runs_after_one_warning(run_python):
    script = """
import sys, warnings
sys.modules["pyaccel._C"] = None
import torch
from pyaccel import ops, reference
words = torch.arange(100, dtype=torch.int8)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    got = ops.flip_bits(words, 0.1, seed=1)
    ops.flip_bits_(words, 0.1, seed=1)
    x = torch.ones(9, requires_grad=True)
    ops.sram_noise(x, 0.1, 0.1, signed=True, seed=1).sum().backward()
assert torch.equal(got, words) and torch.equal(got, reference.flip_bits(torch.arange(100, dtype=torch.int8), 0.1, seed=1))
assert x.grad.tolist() == [1.0] * 9
print(sum("plain-torch reference runs instead" in str(w.message) for w in seen))
"""
    result = run_python(script)
    assert result.stdout.strip() == "1", result.stderr


# ---- errors


@pytest.mark.parametrize(
    ("words", "arguments", "error", "message"),
    [
        (torch.zeros(3), {}, TypeError, "words must be int8, uint8, int16 or int32, got torch.float32; quantise first"),
        (torch.zeros(3, dtype=torch.int64), {}, TypeError, "got torch.int64"),
        ([1, 2], {}, TypeError, "words must be a torch.Tensor of integers, got a list"),
        (torch.zeros(3, dtype=torch.int8), dict(word_bits=3), ValueError, "word_bits must be one of 1, 2, 4, 8 for torch.int8, got 3"),
        (torch.zeros(3, dtype=torch.int8), dict(word_bits=16), ValueError, "one of 1, 2, 4, 8 for torch.int8, got 16"),
        (torch.zeros(3, dtype=torch.int8), dict(probability=1.1), ValueError, r"a probability must be in \[0, 1\], got 1.1"),
        (torch.zeros(3, dtype=torch.int8), dict(probability=math.nan), ValueError, "got nan"),
        (torch.zeros(3, dtype=torch.int8), dict(probability=[0.1] * 7), ValueError, r"each of the 8 bits of a word .* got 7"),
        (torch.zeros(3, dtype=torch.int8), dict(probability=torch.tensor(0.1)), TypeError, "numbers on the host, got a tensor"),
        (torch.zeros(3, dtype=torch.int8), dict(probability="0.1"), TypeError, "a number or a sequence of numbers, got str"),
        (torch.zeros(3, dtype=torch.int8), dict(mode="fast"), ValueError, "mode must be one of dense, sparse, got 'fast'"),
        (torch.zeros(3, dtype=torch.int8), dict(semantics="x"), ValueError, "semantics must be one of flip, stuck, got 'x'"),
        (torch.zeros(3, dtype=torch.int8), dict(seed=1 << 64), ValueError, "seed must be in"),
        (torch.zeros(3, dtype=torch.int8), dict(stream=-1), ValueError, r"stream must be in 0..4294967295, got -1"),
        (torch.zeros(3, dtype=torch.int8), dict(first_element=-1), ValueError, "first_element must be in 0"),
        (torch.zeros(3, dtype=torch.int8), dict(seed=torch.zeros(2, dtype=torch.int64)), ValueError, r"seed must have shape \[3\]"),
    ],
)
@pytest.mark.parametrize("function", [ops.flip_bits, ops.flip_bits_])
def test_wrong_calls(function, words, arguments, error, message):
    with pytest.raises(error, match=message):
        function(words, **(dict(probability=0.1, seed=1) | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(3, dtype=torch.int8)), TypeError, "x must be float32"),
        (dict(scale=0.0), ValueError, "scale must be a finite number above 0, got 0.0"),
        (dict(scale=torch.ones(2)), ValueError, r"scale must have shape \[\], got \[2\]"),
        (dict(scale=torch.ones((), dtype=torch.float64)), TypeError, "scale must be torch.float32"),
        (dict(scale=torch.ones((), requires_grad=True)), ValueError, "scale has no gradient here; pass scale.detach()"),
        (dict(word_bits=32), ValueError, "word_bits must be 2, 4, 8 or 16 for signed words, got 32"),
        (dict(word_bits=1), ValueError, "2, 4, 8 or 16 for signed words, got 1"),
        (dict(probability=-0.1), ValueError, r"in \[0, 1\], got -0.1"),
    ],
)
def test_wrong_noise_calls(arguments, error, message):
    arguments = dict(x=torch.ones(3), scale=0.1, probability=0.1, signed=True, seed=1) | arguments
    with pytest.raises(error, match=message):
        ops.sram_noise(arguments.pop("x"), **arguments)


def test_the_binding_refuses_what_the_wrapper_would_never_pass():
    plan = extension._C.sram.Plan(False, [(1, 0, [])] * 8)
    words = torch.zeros(4, 4, dtype=torch.int8)
    for wrong in (torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.int16), torch.zeros(3, 4, dtype=torch.int8), words.t()[:2]):
        with pytest.raises(ValueError, match="flip_bits: out must be"):
            extension._C.sram.flip(words, wrong, plan, 1, 0, 0, False)
    with pytest.raises(ValueError, match="words must be contiguous"):
        extension._C.sram.flip(words.t(), words, plan, 1, 0, 0, False)
    with pytest.raises(ValueError, match="one entry for each of"):
        extension._C.sram.Plan(False, [(1, 0, [])] * 3)


def test_golden_vectors_reach_the_kernels(level):
    masks = ops.flip_bits(torch.zeros(4096, dtype=torch.uint8), [0.05] * 4 + [0.0] * 4, seed=SEED, stream=STREAM)
    assert f"{zlib.crc32(masks.numpy().tobytes()):08x}" == "ae9f0708"
    one = ops.flip_bits(torch.zeros(65536, dtype=torch.uint8), [0.01] + [0.0] * 7, seed=SEED, stream=STREAM, mode="sparse")
    positions = one.nonzero()[:, 0].to(torch.int32)
    assert len(positions) == 646 and f"{zlib.crc32(positions.numpy().tobytes()):08x}" == "1f303774"
