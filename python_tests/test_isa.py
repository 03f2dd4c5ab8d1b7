"""Every instruction-set level gives the same results, only what belongs to a level is compiled for it, and wishes are checked."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from pyaccel import extension, ops

pytestmark = pytest.mark.skipif(extension._C is None, reason="no compiled module")
ORDER = ("baseline", "avx2", "avx512")
BEST = extension._C.build_info()["best_isa"] if extension._C is not None else "baseline"
LEVELS = ORDER[: ORDER.index(BEST) + 1]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def at_level():
    before = extension._C.build_info()["isa"]

    def run(level, function):
        extension._C.force_isa(level)
        try:
            assert extension._C.build_info()["isa"] == level
            return function()
        finally:
            extension._C.force_isa(before)

    return run


def leaf(t):
    return t.detach().clone().requires_grad_()


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def close(a, b, dtype):
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 0.0)
    bound = (1e-12 if dtype == torch.float64 else 1e-5) * float(b.abs().max()) + rounding * b.double().abs() + 2.0**-24 * (rounding > 0)
    assert ((a.double() - b.double()).abs() <= bound).all()


@pytest.mark.parametrize("level", LEVELS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("surrogate", ["triangle", "rectangle", "atan", "sigmoid", "fast_sigmoid"])
def test_lif(at_level, level, dtype, delay, surrogate):
    torch.manual_seed(0)
    x, grad = torch.randn(140, 3, 5, 29).to(dtype), torch.randn(140, 3, 5, 29).to(dtype)
    x[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    state = torch.float64 if dtype == torch.float64 else torch.float32
    channels = torch.rand(5, dtype=state) * 0.3 + 0.7

    def run():
        plain = ops.lif(x, leak=0.9, delay=delay)
        current, leak = leaf(x.nan_to_num(0.5, 2, -2)), leaf(channels)
        spikes, v = ops.lif(current, leak=leak, delay=delay, surrogate=surrogate, detach_reset=False)
        spikes.backward(grad)
        return *plain, spikes.detach(), v.detach(), current.grad, leak.grad

    ours, best = at_level(level, run), at_level(BEST, run)
    for a, b in zip(ours[:4], best[:4], strict=True):
        equal(a, b)
    close(ours[4], best[4], dtype)
    assert (ours[5] - best[5]).abs().max() <= 1e-5 * float(grad.double().abs().sum())


@pytest.mark.parametrize("level", LEVELS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [(4, 3, 9, 11), (6, 70), (2, 5, 2, 2)])
def test_bntt(at_level, level, dtype, step):
    torch.manual_seed(0)
    x, grad = torch.randn(7, *step).to(dtype), torch.randn(7, *step).to(dtype)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    weight, mean, var = (torch.rand(7, step[1], dtype=state) + 0.5 for _ in range(3))

    def run():
        current, gamma = leaf(x), leaf(weight)
        spikes, v, _, _ = ops.bntt_lif(current, gamma, mean=mean, var=var)
        spikes.backward(grad)
        return spikes.detach(), v.detach(), current.grad, gamma.grad, *ops.bntt_lif(x, weight)[2:]

    ours, best = at_level(level, run), at_level(BEST, run)
    equal(ours[0], best[0]), equal(ours[1], best[1])
    close(ours[2], best[2], dtype)
    assert (ours[3] - best[3]).abs().max() <= 1e-5 * 7 * x[0, :, 0].numel()
    for a, b in zip(ours[4:], best[4:], strict=True):
        close(a, b, state)


@pytest.mark.parametrize("level", LEVELS[:-1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoder(at_level, level, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 9, 7).to(dtype)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):

        def run(image=image):
            return ops.poisson_encode(image, 9, seed=-5, stream=0xFFFFFFFF, first_step=60_000)

        equal(at_level(level, run), at_level(BEST, run))


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_the_environment_chooses(run_python, level):
    done = run_python("from pyaccel.extension import _C; print(_C.build_info()['isa'])", PYACCEL_ISA=level)
    assert done.stdout.strip() == level, done.stderr


def test_nonsense_is_refused_at_import(run_python):
    done = run_python("import pyaccel", PYACCEL_ISA="nonsense")
    assert done.returncode != 0
    assert 'PYACCEL_ISA must be baseline, avx2 or avx512, got "nonsense"' in done.stderr


@pytest.mark.skipif(BEST == "avx512", reason="this processor has every level")
def test_more_than_the_processor_has_is_refused(run_python):
    wish = ORDER[ORDER.index(BEST) + 1]
    text = f"PYACCEL_ISA asks for {wish}, but this processor offers {BEST} at most"
    with pytest.raises(ValueError, match=text):
        extension._C.force_isa(wish)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match='isa must be baseline, avx2 or avx512, got "sse9"'):
        extension._C.force_isa("sse9")


WIDE = re.compile(r"%[yz]mm|%xmm(?:1[6-9]|2\d|3[01])\b|%k[0-7]\b")
VEX = re.compile(r"\tv[a-z]")  # AVX encodings of narrow registers fault as well


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_wide_instructions_stay_in_their_namespace():
    """The linker merges inline functions of the same name: one compiled for AVX-512 would then run everywhere."""
    command = ["objdump", "-d", "--no-show-raw-insn", "--demangle", extension._C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "file format elf64-x86-64" not in listing:
        pytest.skip("not an x86-64 build")
    symbol, counts, strays = "", {"avx2": 0, "avx512": 0}, set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            symbol = line[line.index("<") + 1 : -2]
            level = next((name for name in ("avx512", "avx2") if f"::{name}::" in symbol), None)
        elif "\tv" in line or "%k" in line:
            if level is not None:
                counts[level] += 1
                if level == "avx2" and ("%zmm" in line or "%k" in line and WIDE.search(line)):
                    strays.add(f"{symbol}: {line}")
            elif VEX.search(line) or WIDE.search(line):
                strays.add(symbol)
    assert not strays, sorted(strays)[:20]
    assert counts["avx2"] > 1000 and counts["avx512"] > 1000  # symbols are there, so the check means something
