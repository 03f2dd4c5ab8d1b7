"""Quantised multiply-accumulate: `pytest benchmarks/test_qmac.py -m benchmark -s`.

Every case checks its answer first. Times are CPU seconds of all threads, wall seconds for streamed weights; r is the
ratio to the float32 product, for streamed weights to a copy that reads and writes as many bytes as the packed weights have.
Packing of activations is inside every product. What the library's int8 gets wrong on this machine has a row of its own.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timing import measure

from pyaccel import extension, nn, ops, reference
from pyaccel.reference.qmac import code_dtype

pytestmark = [pytest.mark.benchmark, pytest.mark.skipif(extension._C is None, reason="the compiled module is absent")]
WIDTHS = [(8, 8), (8, 4), (4, 4), (8, 2), (2, 2), (1, 1)]  # activation, weight


def codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape).to(code_dtype(bits))


def report(table: list, what: str, cases: dict[str, Callable], rounds: int, floor: dict[str, float] | str, wall: bool = False) -> dict:
    """Times the cases and adds their rows; `floor` is the seconds of the roofline, or the case that stands for it."""
    times = {name: (t.wall if wall else t.cpu) for name, t in measure(cases, rounds, torch.device("cpu")).items()}
    for name, seconds in times.items():
        best = times[floor] if isinstance(floor, str) else floor[name]
        table.append({"what": what, "case": name, "ms": seconds * 1e3, "of 8x8": seconds / times["8x8"], "r": seconds / best})
    return times


def linear_case(activation_bits: int, weight_bits: int, batch: int, length: int, outputs: int) -> Callable:
    a, w = codes(activation_bits, batch, length), codes(weight_bits, outputs, length)
    words = ops.pack_codes(w, weight_bits)

    def run():
        return ops.quantized_linear(
            ops.pack_codes(a, activation_bits), words, activation_bits=activation_bits, weight_bits=weight_bits, length=length
        )

    rows = slice(0, min(batch, 64))
    p, q = run()
    assert torch.equal(p[rows], (a[rows].double() @ w.double().T).to(p.dtype)) and torch.equal(q, a.sum(1).to(q.dtype))
    return run


def library_linear(engine: str, x: torch.Tensor, outputs: int) -> Callable:
    torch.backends.quantized.engine = engine
    weight = torch.quantize_per_tensor(torch.randn(outputs, x.shape[1]), 0.01, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    quantised = torch.quantize_per_tensor(x, 1 / 255, 0, torch.quint8)

    def run():
        torch.backends.quantized.engine = engine
        return torch.ops.quantized.linear(quantised, packed, 0.1, 0)

    run()
    return run


def library_errors() -> str:
    """How far the library's int8 linear is from exact on full-range codes (in output codes)."""
    a, w = torch.randint(0, 256, (64, 512)), torch.randint(-128, 128, (64, 512))
    wanted = (a.double() @ w.double().T) * 0.01 / 255
    step = float(wanted.abs().max()) / 127
    found = []
    for engine in ("fbgemm", "onednn"):
        torch.backends.quantized.engine = engine
        weight = torch.quantize_per_tensor(w.float() * 0.01, 0.01, 0, torch.qint8)
        quantised = torch.quantize_per_tensor(a.float() / 255, 1 / 255, 0, torch.quint8)
        y = torch.ops.quantized.linear(quantised, torch.ops.quantized.linear_prepack(weight, None), step, 128).int_repr()
        off = (y - (wanted / step + 128).round().clamp(0, 255)).abs()
        found.append(f"{engine}: {int((off > 1).sum())} of {off.numel()} outputs off by more than one code (at most {int(off.max())})")
    return "; ".join(found)


@pytest.mark.parametrize("size", [512, 1024])
def test_gemm(size, quick, table):
    x, w = torch.rand(size, size), torch.randn(size, size)
    cases = {f"{a}x{b}": linear_case(a, b, size, size, size) for a, b in WIDTHS}
    cases["float32"] = lambda: torch.mm(x, w)
    narrow_x, narrow_w = x.bfloat16(), w.bfloat16()
    cases["bfloat16"] = lambda: torch.mm(narrow_x, narrow_w)
    for engine in ("fbgemm", "onednn"):
        cases[f"quantized, {engine}"] = library_linear(engine, x, size)
    report(table, f"{size} cubed", cases, 1 if quick else 9, "float32")
    table.append({"what": "full-range codes", "case": library_errors()})


@pytest.mark.parametrize("batch", [1, 8])
def test_small_batch(batch, quick, table):
    size = 1024
    x, w = torch.rand(batch, size), torch.randn(size, size)
    cases = {f"{a}x{b}": linear_case(a, b, batch, size, size) for a, b in WIDTHS}
    cases["float32"] = lambda: F.linear(x, w)
    for engine in ("fbgemm", "onednn"):
        cases[f"quantized, {engine}"] = library_linear(engine, x, size)
    layer = nn.QuantLinear(size, size, weight_bits=4, activation_bits=8)
    layer(x)
    layer.eval()

    def integers():
        with torch.no_grad():
            return layer(x)

    def fake():
        with torch.no_grad():
            activation, weight = layer._fake(x)
            return F.linear(activation, weight, layer.bias)

    assert torch.allclose(integers(), fake(), atol=1e-4)
    cases["QuantLinear 8x4"], cases["fake quantisation"] = integers, fake
    times = report(table, f"batch {batch}, 1024 x 1024", cases, 3 if quick else 101, "float32")
    table[-1]["fake over QuantLinear"] = times["fake quantisation"] / times["QuantLinear 8x4"]


def test_streamed_weights(quick, table):
    """Batch 1, 8192 x 16384: 128 MiB at 8 bits, beyond any cache. Wall time: the CPU waits for memory."""
    outputs, length = 8192, 16384
    memory = torch.ones(outputs * length // 4, dtype=torch.int32)
    target, seconds = torch.empty_like(memory), []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(memory)
        seconds.append(time.perf_counter() - start)
    rate = 2 * memory.numel() * 4 / statistics.median(seconds)
    del memory, target
    cases, floor = {}, {}
    for a, b in [(8, 8), (8, 4), (8, 2), (8, 1)]:
        cases[f"{a}x{b}"] = linear_case(a, b, 1, length, outputs)
        floor[f"{a}x{b}"] = outputs * length * b / 8 / rate
    x, w = torch.randn(length // 4), torch.randn(outputs, length // 4)
    cases["float32, same bytes"], floor["float32, same bytes"] = (lambda: torch.mv(w, x)), outputs * length / rate
    report(table, f"batch 1, 8192 x 16384; copy moves {rate / 1e9:.1f} GB/s", cases, 1 if quick else 9, floor, wall=True)


@pytest.mark.parametrize("channels,size", [(64, 32), (128, 16), (256, 8)])
def test_convolution(channels, size, quick, table):
    """VGG shapes, 3x3, batch 8."""
    x, w = torch.rand(8, channels, size, size), torch.randn(channels, channels, 3, 3)
    last, last_w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    cases = {}
    for a, b in WIDTHS:
        images, filters = codes(a, 8, channels, size, size), ops.pack_codes(codes(b, channels, channels * 9), b)
        options = dict(activation_bits=a, weight_bits=b, padding=1)
        cases[f"{a}x{b}"] = lambda images=images, filters=filters, options=options: ops.quantized_conv2d(
            images, filters, kernel_size=3, **options
        )
        wanted = reference.quantized_conv2d(images[:1], filters, activation_bits=a, weight_bits=b, kernel_size=(3, 3), padding=(1, 1))
        found = cases[f"{a}x{b}"]()
        assert torch.equal(found[0][:1], wanted[0]) and torch.equal(found[1][:1], wanted[1])
    cases["float32"] = lambda: torch.conv2d(x, w, padding=1)
    cases["float32 channels-last"] = lambda: torch.conv2d(last, last_w, padding=1)
    quantised = torch.quantize_per_tensor(last, 1 / 255, 0, torch.quint8)
    for engine in ("fbgemm", "onednn"):
        torch.backends.quantized.engine = engine
        weight = torch.quantize_per_tensor(w, 0.01, 0, torch.qint8)
        packed = torch.ops.quantized.conv2d_prepack(weight, None, [1, 1], [1, 1], [1, 1], 1)

        def run(engine=engine, packed=packed):
            torch.backends.quantized.engine = engine
            return torch.ops.quantized.conv2d(quantised, packed, 0.1, 0)

        cases[f"quantized, {engine}"] = run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report(table, f"3x3, {channels} channels, {size}x{size}, batch 8", cases, 1 if quick else 9, "float32 channels-last")
