"""pack_codes, unpack_codes, quantized_linear, quantized_conv2d against integers of numpy and Python."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pyaccel import extension, ops, reference
from pyaccel.reference.qmac import BITS, code_dtype, sum_dtype, words_of

needs_kernels = pytest.mark.skipif(extension._C is None, reason="the compiled module is absent")
PAIRS = list(itertools.product(BITS, BITS))


def codes_of(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator).to(code_dtype(bits))


def product(a, w, activation_bits, weight_bits):
    words = ops.pack_codes(a, activation_bits), ops.pack_codes(w, weight_bits)
    return ops.quantized_linear(*words, activation_bits=activation_bits, weight_bits=weight_bits, length=a.shape[1])


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request):
    """Each instruction set that this machine has."""
    if extension._C is None:
        pytest.skip("the compiled module is absent")
    before = extension._C.build_info()["isa"]
    try:
        extension._C.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    extension._C.force_isa(before)


# ---- packing
def test_golden_words():
    """By hand: code j in bits j*b .. of the row, the least significant first."""
    assert ops.pack_codes(torch.tensor([1, 0, 1, 1], dtype=torch.uint8), 1).tolist() == [0b1101]
    assert ops.pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), 2).tolist() == [0b111001]
    assert ops.pack_codes(torch.tensor([0x1, 0xA, 0x7], dtype=torch.uint8), 4).tolist() == [0x7A1]
    assert ops.pack_codes(torch.tensor([1, 2, 3, 254, 9], dtype=torch.uint8), 8).tolist() == [0xFE030201 - (1 << 32), 9]
    assert ops.pack_codes(torch.tensor([0x1234, 0xFEDC, 5], dtype=torch.int32), 16).tolist() == [0xFEDC1234 - (1 << 32), 5]
    assert ops.pack_codes(torch.ones(32, dtype=torch.uint8), 1).tolist() == [-1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 31, 32, 33, 129])
def test_packing_round_trip(level, bits, length):
    codes = codes_of(bits, 3, 2, length)
    words = ops.pack_codes(codes, bits)
    assert words.shape == (3, 2, words_of(length, bits)) and words.dtype == torch.int32
    assert torch.equal(words, reference.pack_codes(codes, bits))
    back = ops.unpack_codes(words, bits, length)
    assert back.dtype == codes.dtype and torch.equal(back, codes)
    assert torch.equal(reference.unpack_codes(words, bits, length), codes)


def test_packing_of_slices():
    codes = codes_of(4, 6, 40)
    assert torch.equal(ops.pack_codes(codes.T, 4), ops.pack_codes(codes.T.contiguous(), 4))
    assert torch.equal(ops.pack_codes(codes[::2, 3:], 4), reference.pack_codes(codes[::2, 3:], 4))


# ---- exact products
@pytest.mark.parametrize("activation_bits,weight_bits", PAIRS)
def test_linear_is_exact(level, activation_bits, weight_bits):
    """Section 8.2 of the specification: int64 numpy, odd K, all-max codes (overflow), all-zero."""
    for (batch, outputs), length in itertools.product([(1, 7), (9, 17), (37, 130)], [1, 31, 32, 33, 1000, 4608]):
        for fill in ("random", "largest", "zero"):
            a, w = codes_of(activation_bits, batch, length), codes_of(weight_bits, outputs, length, seed=1)
            if fill != "random":
                a.fill_((1 << activation_bits) - 1 if fill == "largest" else 0)
                w.fill_((1 << weight_bits) - 1 if fill == "largest" else 0)
            p, q = product(a, w, activation_bits, weight_bits)
            wanted = torch.from_numpy(a.double().numpy() @ w.double().numpy().T).to(torch.int64)  # exact: below 2^53
            assert p.dtype == q.dtype == sum_dtype(activation_bits, weight_bits, length)
            assert torch.equal(p.to(torch.int64), wanted), (batch, outputs, length, fill)
            assert np.array_equal(q.numpy(), a.numpy().astype(np.int64).sum(1))


def test_linear_against_int64_numpy():
    """The oracle of the other tests goes through float64; this one does not."""
    for activation_bits, weight_bits in PAIRS:
        a, w = codes_of(activation_bits, 11, 333), codes_of(weight_bits, 13, 333, seed=1)
        p, _ = product(a, w, activation_bits, weight_bits)
        assert np.array_equal(p.numpy(), a.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T)


@pytest.mark.parametrize("activation_bits,weight_bits", [(8, 8), (8, 4), (2, 2), (1, 1), (16, 8)])
def test_sums_beyond_32_bits(level, activation_bits, weight_bits):
    """K where 8x8 bits no longer fit int32 (33,026), and more than one stretch of every kernel."""
    length = 70_001
    for batch in (2, 10):
        a = torch.full((batch, length), (1 << activation_bits) - 1, dtype=code_dtype(activation_bits))
        w = torch.full((3, length), (1 << weight_bits) - 1, dtype=code_dtype(weight_bits))
        p, q = product(a, w, activation_bits, weight_bits)
        assert (p == length * ((1 << activation_bits) - 1) * ((1 << weight_bits) - 1)).all()
        assert (q == length * ((1 << activation_bits) - 1)).all()
    assert sum_dtype(8, 8, 33_025) == torch.int32 and sum_dtype(8, 8, 33_026) == torch.int64


@pytest.mark.parametrize("batch", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("activation_bits,weight_bits", [(1, 1), (2, 2), (8, 4), (4, 8), (8, 8), (16, 2)])
def test_padding_bits_never_count(level, batch, activation_bits, weight_bits):
    """Bits of a row's last word beyond its length may hold anything."""
    length = 133
    a, w = codes_of(activation_bits, batch, length), codes_of(weight_bits, 9, length, seed=1)
    words = []
    for codes, bits in ((a, activation_bits), (w, weight_bits)):
        packed = ops.pack_codes(codes, bits)
        used = length * bits - 32 * (packed.shape[1] - 1)
        if used < 32:
            packed[:, -1] |= -1 << used
        words.append(packed)
    found = ops.quantized_linear(*words, activation_bits=activation_bits, weight_bits=weight_bits, length=length)
    wanted = product(a, w, activation_bits, weight_bits)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@needs_kernels
def test_linear_is_the_same_on_every_level_and_thread_count():
    a, w = codes_of(4, 100, 700), codes_of(4, 90, 700, seed=1)
    before, threads = extension._C.build_info()["isa"], torch.get_num_threads()
    results = []
    for level in ("baseline", "avx2", "avx512"):
        try:
            extension._C.force_isa(level)
        except ValueError:
            continue
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(product(a, w, 4, 4)[0])
    extension._C.force_isa(before)
    torch.set_num_threads(threads)
    assert len(results) >= 3 and all(torch.equal(results[0], r) for r in results)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PAIRS), st.integers(0, 20), st.integers(0, 40), st.integers(0, 200), st.integers(0, 1000)
)  # fmt: skip
def test_linear_any_size(pair, batch, outputs, length, seed):
    a, w = codes_of(pair[0], batch, length, seed=seed), codes_of(pair[1], outputs, length, seed=seed + 1)
    p, q = product(a, w, *pair)
    assert torch.equal(p.to(torch.int64), (a.double() @ w.double().T).to(torch.int64))
    assert torch.equal(q.to(torch.int64), a.to(torch.int64).sum(1))


GEOMETRIES = [
    # batch, channels, height, width, outputs, groups, kernel, stride, padding, dilation
    (2, 6, 9, 11, 8, 2, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 3, 8, 8, 5, 1, (3, 2), (2, 2), (1, 0), (1, 1)),
    (3, 8, 5, 7, 4, 4, (2, 3), (1, 3), (2, 1), (2, 1)),
    (2, 16, 6, 6, 9, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 4, 1, 13, 6, 1, (1, 5), (1, 2), (0, 2), (1, 2)),
    (2, 40, 4, 4, 13, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (4, 5, 1, 1, 3, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 8, 6, 6, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 2, 20, 3, 1, 1, (3, 3), (3, 1), (0, 1), (3, 1)),
]


@pytest.mark.parametrize("activation_bits,weight_bits", PAIRS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "-".join(map(str, g[:6])))
def test_conv2d_is_exact(level, activation_bits, weight_bits, geometry):
    batch, channels, height, width, outputs, groups, kernel, stride, padding, dilation = geometry
    length = channels // groups * kernel[0] * kernel[1]
    for fill in ("random", "largest"):
        a, w = codes_of(activation_bits, batch, channels, height, width), codes_of(weight_bits, outputs, length, seed=1)
        if fill == "largest":
            a.fill_((1 << activation_bits) - 1), w.fill_((1 << weight_bits) - 1)
        options = dict(activation_bits=activation_bits, weight_bits=weight_bits, kernel_size=kernel, stride=stride,
                       padding=padding, dilation=dilation, groups=groups)  # fmt: skip
        p, q = ops.quantized_conv2d(a, ops.pack_codes(w, weight_bits), **options)
        wanted_p, wanted_q = reference.quantized_conv2d(a, ops.pack_codes(w, weight_bits), **options)
        assert p.dtype == q.dtype == wanted_p.dtype
        assert torch.equal(p, wanted_p) and torch.equal(q, wanted_q)


def test_conv2d_over_a_grid():
    """Stride, padding, dilation, groups in full product, 4x8 bits, against the float64 twin."""
    for stride, padding, dilation, groups in itertools.product((1, 2, 3), (0, 1, 2), (1, 2), (1, 2, 4)):
        a, w = codes_of(4, 2, 8, 9, 10), codes_of(8, 12, 8 // groups * 9, seed=1)
        options = dict(activation_bits=4, weight_bits=8, kernel_size=3, stride=stride, padding=padding, dilation=dilation, groups=groups)
        p, q = ops.quantized_conv2d(a, ops.pack_codes(w, 8), **options)
        pairs = {k: (v, v) for k, v in options.items() if k in ("kernel_size", "stride", "padding", "dilation")}
        wanted = reference.quantized_conv2d(a, ops.pack_codes(w, 8), **{**options, **pairs})
        assert torch.equal(p, wanted[0]) and torch.equal(q, wanted[1]), (stride, padding, dilation, groups)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_conv2d_over_many_blocks(level, size):
    """More pixels than one block of tiles, more steps than one stretch, threads."""
    a, w = codes_of(8, 3, 64, size, 17), codes_of(8, 70, 576, seed=1)
    for bits in (8, 1):
        x, v = (a, w) if bits == 8 else (a & 1, w & 1)
        options = dict(activation_bits=bits, weight_bits=bits, kernel_size=(3, 3), padding=(1, 1))
        p, q = ops.quantized_conv2d(x, ops.pack_codes(v, bits), **options)
        wanted = reference.quantized_conv2d(x, ops.pack_codes(v, bits), **options)
        assert torch.equal(p, wanted[0]) and torch.equal(q, wanted[1])


def test_conv2d_takes_channels_last_and_slices():
    a, w = codes_of(4, 2, 6, 7, 8), ops.pack_codes(codes_of(4, 5, 54, seed=1), 4)
    options = dict(activation_bits=4, weight_bits=4, kernel_size=3, padding=1)
    p, q = ops.quantized_conv2d(a, w, **options)
    last = ops.quantized_conv2d(a.to(memory_format=torch.channels_last), w, **options)
    assert torch.equal(p, last[0]) and torch.equal(q, last[1])
    sliced = ops.quantized_conv2d(codes_of(4, 4, 6, 7, 8)[::2], w, **options)
    assert torch.equal(sliced[0], ops.quantized_conv2d(codes_of(4, 4, 6, 7, 8)[::2].contiguous(), w, **options)[0])


def test_empty_batches():
    assert ops.quantized_linear(torch.empty(0, 2, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32), activation_bits=8,
                                weight_bits=8, length=8)[0].shape == (0, 3)  # fmt: skip
    p, q = ops.quantized_conv2d(torch.empty(0, 2, 4, 4, dtype=torch.uint8), torch.zeros(3, 5, dtype=torch.int32), activation_bits=8,
                                weight_bits=8, kernel_size=3)  # fmt: skip
    assert p.shape == (0, 3, 2, 2) and q.shape == (0, 1, 2, 2)
    p, q = ops.quantized_linear(torch.zeros(2, 0, dtype=torch.int32), torch.zeros(3, 0, dtype=torch.int32), activation_bits=4,
                                weight_bits=4, length=0)  # fmt: skip
    assert p.tolist() == [[0] * 3] * 2 and q.tolist() == [0, 0]


# ---- codes and sums
@pytest.mark.parametrize("bits", [1, 3, 8, 12, 16])
def test_quantize_codes_equals_its_twin(level, bits):
    x = torch.cat([torch.randn(1001) * 3, torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30])])
    steps = torch.arange(0, 40) * 0.05  # exact halves of a step, half to even
    x = torch.cat([x, steps])
    for scale in (0.1, 0.01, 3.7):
        codes = ops.quantize_codes(x, scale, bits)
        assert codes.dtype == (torch.int32 if bits > 8 else torch.uint8)
        assert torch.equal(codes, reference.quantize_codes(x, scale, bits))
    image = torch.rand(2, 3, 5, 7).to(memory_format=torch.channels_last)
    codes = ops.quantize_codes(image, 0.01, bits)
    assert torch.equal(codes, reference.quantize_codes(image, 0.01, bits))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape,q_shape", [((5, 13), (5,)), ((3, 8, 5, 7), (3, 2, 5, 7)), ((2, 4, 1, 1), (2, 2, 1, 1)), ((2, 3, 4, 4), (2, 1, 4, 4))])
def test_dequantize_sums_equals_its_twin(level, dtype, shape, q_shape):
    p, q = torch.randint(-(1 << 30), 1 << 30, shape, dtype=dtype), torch.randint(0, 1 << 30, q_shape, dtype=dtype)
    for bias in (None, torch.randn(shape[1])):
        y = ops.dequantize_sums(p, q, p_scale=0.37, q_scale=-1.9, bias=bias)
        assert torch.equal(y, reference.dequantize_sums(p, q, p_scale=0.37, q_scale=-1.9, bias=bias))


# ---- as torch operators
def test_opcheck():
    a, w = ops.pack_codes(codes_of(4, 5, 40), 4), ops.pack_codes(codes_of(2, 6, 40), 2)
    images, filters = codes_of(2, 2, 4, 6, 6), ops.pack_codes(codes_of(2, 3, 36), 2)
    calls = [
        (torch.ops.pyaccel.pack_codes, (codes_of(4, 5, 40), 4)),
        (torch.ops.pyaccel.unpack_codes, (a, 4, 40)),
        (torch.ops.pyaccel.quantized_linear, (a, w, 4, 2, 40)),
        (torch.ops.pyaccel.quantized_conv2d, (images, filters, 2, 2, [3, 3], [1, 2], [1, 0], [1, 1], 1)),
        (torch.ops.pyaccel.quantize_codes, (torch.rand(4, 5), 0.1, 3)),
        (torch.ops.pyaccel.dequantize_sums, (torch.ones(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32), torch.rand(3), 0.5, 0.25)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


def test_flops():
    a, w = ops.pack_codes(codes_of(4, 5, 40), 4), ops.pack_codes(codes_of(2, 6, 40), 2)
    with FlopCounterMode(display=False) as counter:
        ops.quantized_linear(a, w, activation_bits=4, weight_bits=2, length=40)
    assert counter.get_total_flops() == 2 * 5 * 6 * 40
    with FlopCounterMode(display=False) as counter:
        ops.quantized_conv2d(codes_of(2, 2, 4, 6, 6), ops.pack_codes(codes_of(2, 6, 18), 2), activation_bits=2, weight_bits=2,
                             kernel_size=3, padding=1, groups=2)  # fmt: skip
    assert counter.get_total_flops() == 2 * 2 * 6 * 36 * 18


# ---- errors
def test_errors_of_packing():
    codes = codes_of(8, 2, 9)
    with pytest.raises(ValueError, match=r"pack_codes: bits must be one of 1, 2, 4, 8, 16, got 3; a width between lives in the next"):
        ops.pack_codes(codes, 3)
    with pytest.raises(TypeError, match=r"codes of 16 bits must be torch.int32, got torch.uint8"):
        ops.pack_codes(codes, 16)
    with pytest.raises(ValueError, match=r"pack_codes: codes must be in 0..3 for 2 bits, got 0..4"):
        ops.pack_codes(torch.tensor([[0, 1, 4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match=r"codes must be in 0..15 for 4 bits, got 0..16"):
        ops.pack_codes(torch.tensor([0] * 20 + [16], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=r"codes must be in 0..65535 for 16 bits, got -1..7"):
        ops.pack_codes(torch.tensor([[7, -1]], dtype=torch.int32), 16)
    with pytest.raises(ValueError, match=r"unpack_codes: words of 9 codes of 8 bits must be \[..., 3\], got \[2, 2\]"):
        ops.unpack_codes(torch.zeros(2, 2, dtype=torch.int32), 8, 9)


def test_errors_of_products():
    a, w = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int32)
    widths = dict(activation_bits=8, weight_bits=8)
    with pytest.raises(ValueError, match=r"activation_words of 13 codes of 8 bits must be \[rows, 4\], got \[2, 3\]"):
        ops.quantized_linear(a, w, length=13, **widths)
    with pytest.raises(ValueError, match=r"weight_words of 12 codes of 4 bits must be \[rows, 2\], got \[4, 3\]"):
        ops.quantized_linear(a, w, length=12, activation_bits=8, weight_bits=4)
    with pytest.raises(ValueError, match=r"weight_bits must be one of 1, 2, 4, 8, 16, got 5"):
        ops.quantized_linear(a, w, length=12, activation_bits=8, weight_bits=5)
    with pytest.raises(TypeError, match=r"activation_words must be int32 words \(see pack_codes\), got torch.float32"):
        ops.quantized_linear(a.float(), w, length=12, **widths)
    images = torch.zeros(1, 4, 5, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"activation_codes must be in 0..3 for 2 bits, got 0..9"):
        ops.quantized_conv2d(images.clone().index_fill_(2, torch.tensor(3), 9), torch.zeros(2, 3, dtype=torch.int32), activation_bits=2,
                             weight_bits=2, kernel_size=3)  # fmt: skip
    with pytest.raises(ValueError, match=r"the kernel spans 7 along H, the padded input has 5"):
        ops.quantized_conv2d(images, torch.zeros(2, 28, dtype=torch.int32), kernel_size=(7, 4), **widths)
    with pytest.raises(ValueError, match=r"groups must divide the 4 channels of activation_codes, got 3"):
        ops.quantized_conv2d(images, torch.zeros(3, 3, dtype=torch.int32), kernel_size=3, groups=3, **widths)
    with pytest.raises(ValueError, match=r"groups must divide the 3 rows of weight_words, got 2"):
        ops.quantized_conv2d(images, torch.zeros(3, 5, dtype=torch.int32), kernel_size=3, groups=2, **widths)
    with pytest.raises(ValueError, match=r"stride must be in 1..1048576, got 0"):
        ops.quantized_conv2d(images, torch.zeros(3, 9, dtype=torch.int32), kernel_size=3, stride=0, **widths)
