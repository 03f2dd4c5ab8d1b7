"""Failing memory: 16M int8 words, all eight bits noisy, in place, beside a copy of the tensor, the raw generator and peers.

Two yardsticks: a copy of the same words (source and target just fit many L3 caches, so it moves by 2 between runs), and
the Philox stream that a dense kernel cannot do without (one byte a bit), drawn and XORed together, never stored. The
integer floor of that stream is derived in `philox_floor`.

Peers, doing the same work on the same words. Their own code, where it is at hand (`sram_peers.py`):
    the C loop of davidstutz/random-bit-error-robustness: one float32 random a bit, given, or drawn by torch as it does
    MRFI: positions by rate, one random bit of each; it loses the flips that meet twice
Restated from their sources:
    the loop by torch operations on blocks (marked "torch form": slower than the loop in C)
    binomial count, positions, and a scatter of XORs (numpy), as MRFI-style selectors do
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from sram_peers import davidstutz_loop, mrfi
from timing import measure

from pyaccel import extension, ops, reference

pytestmark = pytest.mark.benchmark
WORDS = 1 << 24
GOALS = {("dense", 1e-1): 12, ("sparse", 1e-2): 3, ("sparse", 1e-3): 0.3, ("sparse", 1e-4): 0.08}
THREADS = 2


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def clock() -> float:
    """GHz now: a chain of dependent additions takes one cycle each. (/proc/cpuinfo often names the base clock.)"""

    def rate() -> float:
        start = time.process_time()
        extension._C.sram.additions(4_000_000)
        return 32e6 / (time.process_time() - start) / 1e9

    return max(rate() for _ in range(5))


def philox_floor() -> tuple[float, str]:
    """Cycles a 64 bytes of stream that the integer work alone needs on this instruction set, and how it is counted.

    A 128-bit block costs 20 multiplications, 20 shifts and 40 XORs; the first two rounds share 3 multiplications, 4 shifts
    and 4 XORs over a run; the last needs 2 ANDs. AVX2: 4 counters a register, XORs of two operands, at most four vector
    operations a cycle, of them two multiplications and two shifts. AVX-512: 8 counters, three-operand XORs, two operations a
    cycle, of them one multiplication and one shift.
    """
    if extension._C.build_info()["isa"] == "avx512":
        return max(17, (17 + 18 + 20) / 2) / 2, "55 operations a 128 bytes, 2 a cycle"
    return (17 + 18 + 37) / 4, "72 operations a 64 bytes, 4 a cycle"


def raw(words: int):
    return lambda: extension._C.sram.raw_philox(1, 0, 2, 0, words * 8 // 16, None)


def davidstutz(words: torch.Tensor, randoms: torch.Tensor, p: float) -> torch.Tensor:
    masks = torch.zeros_like(words)
    for b in range(8):
        masks |= (randoms[b] < p).to(torch.int8) << b
    return words ^ masks


def scattered(words: np.ndarray, p: float, generator: np.random.Generator) -> np.ndarray:
    bits = words.size * 8
    positions = generator.integers(0, bits, generator.binomial(bits, p))
    out = words.copy()
    np.bitwise_xor.at(out, positions >> 3, np.uint8(1) << (positions & 7).astype(np.uint8))
    return out


def check(mode: str, p: float) -> None:
    """The answer first: the twin's bits at both ends of a large memory."""
    words = torch.arange(1 << 20, dtype=torch.int32).to(torch.int8)
    got = ops.flip_bits(words, p, seed=1, stream=2, mode=mode)
    for piece in (slice(0, 1 << 13), slice((1 << 20) - (1 << 13), 1 << 20)):
        expected = reference.flip_bits(words[piece], p, seed=1, stream=2, mode=mode, first_element=piece.start)
        assert torch.equal(got[piece], expected)


def own_code(words: torch.Tensor, part: torch.Tensor) -> dict:
    """The peers' own code, its answer checked first."""
    found = {}
    if (loop := davidstutz_loop()) is not None:
        randoms = torch.rand(len(part), 8)
        expected = davidstutz(part, randoms.T, 0.1)
        assert torch.equal(loop(part, randoms, 0.1), expected)
        found["peer: davidstutz's C loop, randoms given (1/16 of the words)"] = lambda: loop(part, randoms, 0.1)
        found["peer: same, drawing its randoms (1/16)"] = lambda: loop(part, torch.rand(len(part), 8), 0.1)
    if (flip := mrfi()) is not None:
        for p in (1e-2, 1e-3):
            changed = (flip(words, p) ^ words).view(torch.uint8)
            flips = sum(int(((changed >> b) & 1).sum()) for b in range(8))
            assert 0.95 < flips / (8 * len(words) * p) < 1.02  # 0.96 at 1e-2: a word that is drawn twice flips once
            found[f"peer: MRFI, p = {p:g}"] = lambda p=p: flip(words, p)
    return found


def test_flip_bits(table, quick):
    words = torch.randint(-128, 128, (WORDS,), dtype=torch.int8)
    target = torch.empty_like(words)
    randoms = torch.rand(8, WORDS >> 4)
    part = words[: WORDS >> 4]
    generator = np.random.default_rng(0)
    key = torch.tensor([1, 2, 0])

    def flip(p: float, mode: str, semantics: str = "flip"):
        return lambda: ops.flip_bits_(words, p, seed=key, mode=mode, semantics=semantics)

    cases = [*((mode, p, "flip") for mode, p in GOALS), ("dense", 1e-3, "flip"), ("dense", 1e-1, "stuck"), ("sparse", 1e-2, "stuck")]
    for mode, p, _ in cases:
        check(mode, p)
    jobs = {"copy": lambda: target.copy_(words), "raw Philox": raw(WORDS)}
    jobs |= {f"{mode} {p:g} {how}": flip(p, mode, how) for mode, p, how in cases}
    peers = {
        "peer: one random a bit, torch form (1/16 of the words)": lambda: davidstutz(part, randoms, 0.1),
        "peer: same, drawing its randoms (1/16)": lambda: davidstutz(part, torch.rand(8, WORDS >> 4, out=randoms), 0.1),
        "peer: scattered XORs, p = 1e-2 (1/16)": lambda: scattered(part.numpy().view(np.uint8), 1e-2, generator),
    }
    peers |= own_code(words, part)
    times = measure(jobs | peers, 3 if quick else 9, torch.device("cpu"))
    copy, stream = times["copy"], times["raw Philox"]
    cycles, how = philox_floor()
    ghz = clock()
    share = cycles * WORDS * 8 / 64 / (ghz * 1e9) / stream.cpu
    table.append({"what": f"integer floor of Philox: {how}, at {ghz:.2f} GHz", "share of it reached": share})
    for name, found in times.items():
        scale = 16 if "1/16" in name else 1
        mode, p = (name.split()[0], float(name.split()[1])) if name.endswith("flip") else (None, None)
        table.append(
            {
                "what": name,
                "ms CPU": found.cpu * scale * 1e3,
                "ms wall": found.wall * scale * 1e3,
                "CPU / copy": found.cpu * scale / copy.cpu,
                "wall / copy": found.wall * scale / copy.wall,
                "CPU / raw Philox": found.cpu * scale / stream.cpu,
                "goal (AVX-512, wall / copy)": GOALS.get((mode, p)),
            }
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sram_noise(table, quick, dtype):
    """Quantise, flip and dequantise 16M values beside a copy of them, and beside the same in plain torch."""
    x = torch.randn(WORDS, dtype=torch.float32).to(dtype)
    y = torch.empty_like(x)
    plans = {
        "sparse 1e-3": ops.sram._plan((1e-3,) * 8, 8, True),
        "sparse 1e-4": ops.sram._plan((1e-4,) * 8, 8, True),
        "dense 0.1": ops.sram._plan((0.1,) * 8, 8, False),
    }
    for mode, p in (("sparse", 1e-3), ("dense", 0.1)):
        options = dict(signed=True, seed=1, stream=2, mode=mode)
        got = ops.sram_noise(x[: 1 << 14], 0.03, p, **options)
        assert torch.equal(got, reference.sram_noise(x[: 1 << 14], 0.03, p, **options))

    def noise(plan):
        return lambda: extension._C.sram.noise(x, None, 0.03, plan, True, 1, 2, 0, y)

    def plain():
        codes = torch.round(x / 0.03).clamp(-127, 127).to(torch.int8)
        return (codes ^ 0).to(dtype) * 0.03

    jobs = {"copy": lambda: y.copy_(x), "plain torch, no flips": plain, "raw Philox": raw(WORDS)}
    jobs |= {name: noise(plan) for name, plan in plans.items()}
    jobs["gradient"] = lambda: extension._C.sram.noise_backward(x, x, None, 0.03, -127, 127, y)
    times = measure(jobs, 3 if quick else 7, torch.device("cpu"))
    for name, found in times.items():
        table.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "what": name,
                "ms CPU": found.cpu * 1e3,
                "CPU / copy": found.cpu / times["copy"].cpu,
                "wall / copy": found.wall / times["copy"].wall,
                "goal (CPU / copy)": 1.5 if name.startswith("sparse") else None,
            }
        )
