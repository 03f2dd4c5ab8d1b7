"""The twins of the failing-memory kernels against golden values of the specification and of an independent slow script."""

from __future__ import annotations

import runpy
import zlib
from decimal import Decimal, getcontext
from pathlib import Path

import pytest
import torch

from pyaccel import reference
from pyaccel.reference import sram

SLOW = runpy.run_path(str(Path(__file__).parent / "slow_sram.py"))
SEED, STREAM = SLOW["SEED"], SLOW["STREAM"]

# Printed by `python python_tests/reference/slow_sram.py`.
GOLDEN = {
    (1, "dense", "flip", 0.07): "2535c6d8",
    (1, "dense", "stuck", 0.07): "9d24de42",
    (1, "sparse", "flip", 0.013): "27cb4420",
    (1, "sparse", "stuck", 0.013): "f33508eb",
    (2, "dense", "flip", 0.07): "98687894",
    (2, "dense", "stuck", 0.07): "393d96e7",
    (2, "sparse", "flip", 0.013): "c4069962",
    (2, "sparse", "stuck", 0.013): "3af2b0a6",
    (4, "dense", "flip", 0.07): "1391646d",
    (4, "dense", "stuck", 0.07): "006d9b0d",
    (4, "sparse", "flip", 0.013): "7fadbfe9",
    (4, "sparse", "stuck", 0.013): "84e2bf5c",
    (8, "dense", "flip", 0.07): "779276bf",
    (8, "dense", "stuck", 0.07): "84eeea43",
    (8, "sparse", "flip", 0.013): "11b0b58f",
    (8, "sparse", "stuck", 0.013): "62e72669",
    (16, "dense", "flip", 0.07): "2a8a5b58",
    (16, "dense", "stuck", 0.07): "54ef903d",
    (16, "sparse", "flip", 0.013): "2daac132",
    (16, "sparse", "stuck", 0.013): "1eb2b40f",
    (32, "dense", "flip", 0.07): "510ec8c6",
    (32, "dense", "stuck", 0.07): "740fe732",
    (32, "sparse", "flip", 0.013): "fd6ce6cf",
    (32, "sparse", "stuck", 0.013): "168def6d",
}


def crc(tensor) -> str:
    return f"{zlib.crc32(tensor.numpy().tobytes()):08x}"


def memory(width: int) -> torch.Tensor:
    words = torch.tensor([i * 37 % 256 for i in range(2048)], dtype=torch.uint8)
    return words.view({16: torch.int16, 32: torch.int32}.get(width, torch.uint8))


def test_the_generator_words_behind_a_dense_flip():
    expected = [0xF79651A7, 0xDA6EBEEA, 0xAE47D11A, 0xE2F0B8C1, 0x696F7F34, 0xFE4D26AB, 0x74115F5F, 0x2BD7D9B1]
    assert [SLOW["uniform"](SEED, i, STREAM) for i in range(8)] == expected
    for i, u in enumerate(expected):  # the decision changes exactly between T = U and T = U + 1
        assert not sram.dense_bits([u], i, 1, SEED, STREAM).item()
        assert sram.dense_bits([u + 1], i, 1, SEED, STREAM).item()


def test_dense_golden_masks():
    masks = reference.flip_bits(
        torch.zeros(4096, dtype=torch.uint8), [0.05] * 4 + [0.0] * 4, seed=SEED, stream=STREAM
    )
    assert masks[:16].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 8, 0]
    assert int(masks[:64].sum()) == 77 and crc(masks) == "ae9f0708"


def test_sparse_golden_positions():
    assert sram.block_size(42949673) == 256
    table = sram.count_table(42949673, 256)
    assert table[:6] == (327770359, 1175338157, 2266902747, 3200429367, 3796849153, 4100481044) and len(table) == 18
    found = sram.sparse_positions(42949673, 0, 0, 65536, SEED, STREAM)
    assert len(found) == 646
    assert found[:12].tolist() == [3, 116, 128, 163, 177, 231, 244, 279, 289, 581, 638, 711]
    assert crc(found.to(torch.int32)) == "1f303774"


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_golden_vectors_of_every_width(case):
    width, mode, semantics, p = case
    read = reference.flip_bits(
        memory(width), SLOW["probabilities"](width, p), word_bits=width, seed=SEED, stream=STREAM, mode=mode, semantics=semantics
    )
    assert crc(read) == GOLDEN[case]


@pytest.mark.parametrize("case", [(4, "dense", "stuck", 0.07), (2, "sparse", "flip", 0.013)], ids=str)
def test_the_slow_script_still_prints_the_golden_values(case):
    assert SLOW["golden"](*case) == GOLDEN[case]


def test_a_dense_failure_index_beyond_32_bits():
    first = (1 << 36) - 40  # the counter's upper half changes inside
    fails = sram.dense_bits([1 << 31], first, 80, SEED, STREAM)
    assert fails.tolist() == [SLOW["dense_fails"](SEED, first + i, STREAM, 1 << 31) for i in range(80)]


@pytest.mark.parametrize("p", [1e-9, 1e-6, 1e-4, 1e-3, 4.9e-4, 0.02, 1 / 32, 0.3, 0.999])
def test_count_tables_against_decimals(p):
    threshold = sram.thresholds(p, 1)[0]
    block = sram.block_size(threshold)
    getcontext().prec = 60
    q = Decimal(threshold) / 2**32
    term, total = (1 - q) ** block, Decimal(0)
    table = sram.count_table(threshold, block)
    for c, entry in enumerate(table):
        total += term
        assert entry == min(int(total * 2**32), 2**32 - 1)
        term *= (block - c) * q / ((c + 1) * (1 - q))
    assert table[-1] == 2**32 - 1 and all(a <= b for a, b in zip(table, table[1:], strict=False))
    assert len(table) <= 65


def test_block_sizes():
    sizes = {p: sram.block_size(sram.thresholds(p, 1)[0]) for p in (1.0, 1 / 32, 0.031, 1 / 64, 1e-2, 1e-3, 1e-4, 1e-8)}
    assert list(sizes.values()) == [64, 64, 128, 128, 256, 2048, 4096, 4096]


def test_straight_through_gradient_of_the_twin():
    x = torch.tensor([-200.0, -127.6, -127.4, 0.0, 0.3, 126.9, 127.4, 127.6, float("nan")], requires_grad=True)
    y = reference.sram_noise(x, 1.0, 0.0, signed=True, seed=1)
    y.backward(torch.arange(1.0, 10.0))
    assert y.tolist() == [-127, -127, -127, 0, 0, 127, 127, 127, 0]
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 9]
