"""`hardware.SramConfig` against the exact tables of the specification and against its own definition by enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from pyaccel.hardware import CURVES, SramConfig, VoltageCurve, measured_magnitude

# E|delta| in LSB for uniform codes: rows k = 1..8, columns p.
PROBABILITIES = (1e-3, 1e-2, 5e-2, 1e-1, 2e-1)
MEAN_ERROR = [
    (0.00100, 0.01000, 0.05000, 0.10000, 0.20000),
    (0.00300, 0.02990, 0.14750, 0.29000, 0.56000),
    (0.00700, 0.06960, 0.34013, 0.66100, 1.24800),
    (0.01499, 0.14890, 0.72312, 1.39490, 2.59840),
    (0.03097, 0.30742, 1.48696, 2.85541, 5.27872),
    (0.06294, 0.62434, 3.01261, 5.76987, 10.62298),
    (0.12688, 1.25810, 6.06198, 11.59288, 21.29838),
    (0.25475, 2.52552, 12.15888, 23.23359, 42.63870),
]


@pytest.mark.parametrize("k", range(1, 9))
def test_the_exact_table_of_mean_errors(k):
    for p, expected in zip(PROBABILITIES, MEAN_ERROR[k - 1], strict=True):
        assert SramConfig(8, n8t=8 - k, p6=p).mean_error_lsb == pytest.approx(expected, abs=5.001e-6)


def test_mean_error_by_enumeration_of_codes_and_masks():
    k, p = 4, 0.05
    total = 0.0
    for code in range(1 << k):
        for mask in range(1 << k):
            flips = mask.bit_count()
            total += abs((code ^ mask) - code) * p**flips * (1 - p) ** (k - flips)
    assert SramConfig(8, n8t=4, p6=p).mean_error_lsb == pytest.approx(total / (1 << k), rel=1e-12)


def test_the_exact_rms():
    for k, expected in ((4, 0.92195), (5, 1.84662), (8, 14.78005)):
        assert SramConfig(8, n8t=8 - k, p6=1e-2).rms_lsb == pytest.approx(expected, abs=5.001e-6)
    all_noisy, half_noisy = SramConfig(8, n8t=0, p6=1e-2), SramConfig(8, n8t=4, p6=1e-2)
    assert all_noisy.rms_lsb / half_noisy.rms_lsb == pytest.approx(math.sqrt((4**8 - 1) / (4**4 - 1)), rel=1e-12)
    assert half_noisy.rms == half_noisy.rms_lsb / 255 and half_noisy.mu == half_noisy.mean_error_lsb / 255


def test_layout_and_rates():
    bank = SramConfig(8, n8t=3, p6=0.1)
    assert bank.probabilities == (0.1,) * 5 + (0.0,) * 3
    assert bank.n6t == 5 and bank.bound == 31
    assert bank.word_error_rate == pytest.approx(1 - 0.9**5)
    stuck = SramConfig(8, n8t=3, p6=0.1, semantics="stuck")
    assert stuck.bit_error_rate == 0.05 and stuck.rms_lsb == pytest.approx(bank.rms_lsb / math.sqrt(2))
    assert stuck.mean_error_lsb == pytest.approx(SramConfig(8, n8t=3, p6=0.05).mean_error_lsb)
    assert SramConfig(8, n8t=8).mean_error_lsb == 0 and SramConfig(8, n8t=8).bound == 0
    assert SramConfig(8, n8t=4, p6=0.1, p8=1e-6).bound == 255


def test_read_and_write_failures():
    bank = SramConfig.read_and_write(0.1, 0.2, n8t=4)
    assert bank.p6 == pytest.approx(0.1 * 0.8 + 0.2 * 0.9)


def test_the_rounded_gaussian_reproduces_its_table():
    expected = {0.70: 0.50, 0.74: 0.261, 0.78: 0.100, 0.80: 5.48e-2, 0.82: 2.74e-2, 0.84: 1.26e-2, 0.86: 5.23e-3}
    expected |= {0.88: 1.99e-3, 0.90: 6.87e-4, 0.92: 2.16e-4, 0.94: 6.15e-5, 0.96: 1.59e-5, 0.98: 3.73e-6, 1.00: 7.9e-7}
    for ratio, p in expected.items():
        # the table has two or three digits
        assert CURVES["gaussian14"].probability(ratio * 0.8, 0.8) == pytest.approx(p, rel=7e-3)


def test_the_measured_curve_meets_its_points_and_falls():
    curve = CURVES["measured14"]
    for ratio, p in curve.points:
        assert curve.probability(ratio, 1.0) == pytest.approx(p, rel=1e-9)
    between = [curve.probability(0.754 + 0.002 * i, 1.0) for i in range(107)]
    assert all(a > b for a, b in zip(between, between[1:], strict=False))
    with pytest.raises(ValueError, match="known for V/V_min from 0.754 to 0.968, got 1.0000"):
        curve.probability(0.8, 0.8)


def test_voltage_needs_a_named_curve():
    bank = SramConfig.at_voltage(0.64, vmin=0.8, curve="gaussian14", n8t=4)
    assert bank.p6 == pytest.approx(0.0548, rel=5e-3) and "gaussian14" in bank.source
    with pytest.raises(TypeError, match="curve"):
        SramConfig.at_voltage(0.68, vmin=0.8, n8t=4)
    with pytest.raises(ValueError, match="curve must be one of measured14, gaussian14 or a VoltageCurve, got '22nm'"):
        SramConfig.at_voltage(0.68, vmin=0.8, curve="22nm", n8t=4)
    own = VoltageCurve("mine", "a test", points=((0.5, 0.1), (1.0, 0.001)))
    assert SramConfig.at_voltage(0.75, vmin=1.0, curve=own, n8t=4).p6 == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(word_bits=7, n8t=4), "word_bits must be one of 1, 2, 4, 8, 16, 32, got 7"),
        (dict(n8t=9), r"n8t must be in 0..8 \(bits in 8T cells\), got 9"),
        (dict(p6=1.5), r"p6 must be a probability in \[0, 1\], got 1.5"),
        (dict(p6=math.nan), r"p6 must be a probability"),
        (dict(semantics="stick"), "semantics must be flip or stuck, got 'stick'"),
    ],
)
def test_wrong_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        SramConfig(**dict(n8t=4) | arguments)


def test_8t_bits_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        SramConfig(8, 4)
    with pytest.raises(TypeError, match="n8t"):
        SramConfig(8, p6=0.1)


def test_wrong_curves():
    with pytest.raises(ValueError, match="either points or gaussian"):
        VoltageCurve("x", "y")
    with pytest.raises(ValueError, match="rising voltage"):
        VoltageCurve("x", "y", points=((1.0, 0.1), (0.9, 0.2)))
    with pytest.raises(ValueError, match="positive volts"):
        CURVES["gaussian14"].probability(0.0, 1.0)


def test_measured_magnitude():
    before, after = torch.tensor([0, 0, 10, 200]), torch.tensor([0, 4, 10, 197])
    mu, rms = measured_magnitude(before, after)
    assert mu == pytest.approx(7 / 4 / 255) and rms == pytest.approx(math.sqrt(25 / 4) / 255)
    with pytest.raises(ValueError, match="two non-empty tensors of one shape"):
        measured_magnitude(before, after[:2])
