"""Hybrid 8T-6T memory at low voltage: which bits of a word fail, and how often."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import torch
from torch import Tensor

WORD_BITS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class VoltageCurve:
    """Bit error rate of a 6T cell against supply voltage.

    Args:
        name: what results call this curve.
        source: where its numbers come from.
        points: `(V / V_min, p)` pairs, rising in voltage; log p is interpolated linearly between them, and a voltage
            outside them is an error. Or:
        gaussian: `(V50, s)` in units of V_min: p(V) = Phi((V50 - V) / s), a normal distribution of the voltage at which a
            cell fails.
        V_min is the lowest voltage at which the whole array works without error.
    """

    name: str
    source: str
    points: tuple[tuple[float, float], ...] = ()
    gaussian: tuple[float, float] | None = None

    def __post_init__(self):
        if bool(self.points) == (self.gaussian is not None):
            raise ValueError("VoltageCurve: give either points or gaussian, not both and not neither")
        volts = [v for v, _ in self.points]
        if self.points and (len(volts) < 2 or any(a >= b for a, b in zip(volts, volts[1:], strict=False))):
            raise ValueError("VoltageCurve: points must be two or more (V/V_min, p) pairs of rising voltage")
        if any(not 0 < p <= 1 for _, p in self.points):
            raise ValueError("VoltageCurve: every p of points must be in (0, 1]")

    def probability(self, vdd: float, vmin: float) -> float:
        """p at `vdd` volts, for a memory whose lowest error-free voltage is `vmin` volts."""
        if not (vdd > 0 and vmin > 0):
            raise ValueError(f"VoltageCurve: vdd and vmin must be positive volts, got {vdd} and {vmin}")
        ratio = vdd / vmin
        if self.gaussian is not None:
            v50, s = self.gaussian
            return 0.5 * math.erfc((ratio - v50) / (s * math.sqrt(2)))
        low, high = self.points[0][0], self.points[-1][0]
        if not low <= ratio <= high:
            raise ValueError(
                f"VoltageCurve {self.name}: known for V/V_min from {low} to {high}, got {ratio:.4f}; "
                "use a curve that covers it, or give p6 itself"
            )
        for (v0, p0), (v1, p1) in zip(self.points, self.points[1:], strict=False):
            if ratio <= v1:
                part = (ratio - v0) / (v1 - v0)
                return math.exp((1 - part) * math.log(p0) + part * math.log(p1))
        raise AssertionError("unreachable")


CURVES = {
    "measured14": VoltageCurve(
        "measured14",
        "14 nm arrays of 512x64 bits (Chandramoorthy et al., HPCA 2019), read by eye from the plot in poster.jpg of "
        "github.com/davidstutz/random-bit-error-robustness @59d8533: about 0.004 in the voltage ratio and 15 % in p; "
        "another reading of the same curve differs by 0.016 in the ratio",
        points=((0.754, 2.0e-1), (0.802, 5.6e-2), (0.846, 1.1e-2), (0.890, 1.3e-3), (0.945, 1.8e-5), (0.968, 2e-6)),
    ),
    "gaussian14": VoltageCurve(
        "gaussian14",
        "our rounded fit to measured14, V50 = 0.700 and s = 0.0625; overstates p two to four times above 0.94 V_min",
        gaussian=(0.700, 0.0625),
    ),
}


@dataclass(frozen=True)
class SramConfig:
    """One memory bank: words of W bits, the `n8t` most significant in 8T cells, the rest in 6T cells that fail.

    Probabilities come first; a voltage means nothing without a curve (`at_voltage`). There is no 22 nm curve here: the one
    that 2011.13392 used could not be obtained, and none is invented.

    Args:
        word_bits: W, 1, 2, 4, 8, 16 or 32.
        n8t: bits in 8T cells, counted from the top, 0..W. By name only, so that "4/4" can never be read the wrong way.
        p6: probability that a 6T bit fails (`semantics="flip"`: reads inverted, a bit error rate; "stuck": the cell has a
            fixed value, and the bit error rate is HALF of p6 on balanced data).
        p8: the same for an 8T bit. 0: at scaled voltages it is orders of magnitude below p6 (ours; remembered, not read).
        semantics: "flip" or "stuck".
        source: where p6 comes from, for reports.
    """

    word_bits: int = 8
    _: KW_ONLY
    n8t: int
    p6: float = 0.0
    p8: float = 0.0
    semantics: str = "flip"
    source: str = "given"

    def __post_init__(self):
        if self.word_bits not in WORD_BITS:
            raise ValueError(f"SramConfig: word_bits must be one of {', '.join(map(str, WORD_BITS))}, got {self.word_bits}")
        if not 0 <= self.n8t <= self.word_bits:
            raise ValueError(f"SramConfig: n8t must be in 0..{self.word_bits} (bits in 8T cells), got {self.n8t}")
        for name in ("p6", "p8"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"SramConfig: {name} must be a probability in [0, 1], got {getattr(self, name)}")
        if self.semantics not in ("flip", "stuck"):
            raise ValueError(f"SramConfig: semantics must be flip or stuck, got {self.semantics!r}")

    @classmethod
    def at_voltage(
        cls, vdd: float, *, vmin: float, curve: VoltageCurve | str, word_bits: int = 8, n8t: int, p8: float = 0.0
    ) -> SramConfig:
        """The bank at `vdd` volts. `curve`: "measured14", "gaussian14", or a `VoltageCurve` of your own; `vmin`: the lowest
        error-free voltage of the memory, volts."""
        if isinstance(curve, str):
            if curve not in CURVES:
                raise ValueError(f"SramConfig: curve must be one of {', '.join(CURVES)} or a VoltageCurve, got {curve!r}")
            curve = CURVES[curve]
        p6 = curve.probability(vdd, vmin)
        source = f"{vdd:g} V of V_min {vmin:g} V on curve {curve.name}: {curve.source}"
        return cls(word_bits, n8t=n8t, p6=p6, p8=p8, source=source)

    @classmethod
    def read_and_write(cls, p_read: float, p_write: float, *, word_bits: int = 8, n8t: int) -> SramConfig:
        """A value written once and read once: wrong where exactly one of the two failed,
        p = p_r (1 - p_w) + p_w (1 - p_r). (p_r + p_w is its small-p approximation.)"""
        p6 = p_read * (1 - p_write) + p_write * (1 - p_read)
        return cls(word_bits, n8t=n8t, p6=p6, source=f"read failures {p_read:g}, write failures {p_write:g}")

    @property
    def n6t(self) -> int:
        """k, bits of a word in 6T cells: the least significant ones."""
        return self.word_bits - self.n8t

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of every bit of a word, least significant first: what `ops.flip_bits` takes."""
        return (self.p6,) * self.n6t + (self.p8,) * self.n8t

    @property
    def bit_error_rate(self) -> float:
        """Probability that a 6T bit reads wrong, on balanced data."""
        return self.p6 if self.semantics == "flip" else self.p6 / 2

    @property
    def word_error_rate(self) -> float:
        """Probability that a word reads wrong somewhere: 1 - (1-p)^k (and the 8T bits)."""
        p8 = self.p8 if self.semantics == "flip" else self.p8 / 2
        return 1 - (1 - self.bit_error_rate) ** self.n6t * (1 - p8) ** self.n8t

    @property
    def bound(self) -> int:
        """Largest possible error of a word in units of its last bit: 2^k - 1 while 8T cells do not fail."""
        return (1 << (self.n6t if self.p8 == 0 else self.word_bits)) - 1

    @cached_property
    def mean_error_lsb(self) -> float:
        """E|q' - q| in LSB for uniform codes: closed form, exact. Independent flips of bit error rate p_b: a uniform bit's
        flip adds +2^b or -2^b with equal odds, so |delta| is |sum of independent terms in {-2^b, 0, 2^b}|."""
        spread = torch.zeros(1, dtype=torch.float64)
        spread[0] = 1.0  # distribution of the sum of the bits so far, over -(2^b - 1) .. 2^b - 1
        rates = [p if self.semantics == "flip" else p / 2 for p in self.probabilities]
        top = max((b for b, p in enumerate(rates) if p > 0), default=-1)
        if top >= 20:
            raise ValueError("SramConfig: the exact mean error is enumerated up to 20 failing bits; use rms_lsb")
        for b in range(top + 1):
            reach, step = (len(spread) - 1) // 2, 1 << b
            wider = torch.zeros(2 * (reach + step) + 1, dtype=torch.float64)
            for offset, weight in ((-step, rates[b] / 2), (0, 1 - rates[b]), (step, rates[b] / 2)):
                wider[step + offset : step + offset + len(spread)] += weight * spread
            spread = wider
        reach = (len(spread) - 1) // 2
        return float((torch.arange(-reach, reach + 1, dtype=torch.float64).abs() * spread).sum())

    @property
    def rms_lsb(self) -> float:
        """sqrt(E (q' - q)^2) in LSB for uniform codes: sqrt(sum p_b 4^b), exact; sqrt(p (4^k - 1)/3) for one p."""
        half = 1.0 if self.semantics == "flip" else 0.5
        return math.sqrt(sum(half * p * 4.0**b for b, p in enumerate(self.probabilities)))

    @property
    def mu(self) -> float:
        """Mean error of uniform codes over full scale: E|q' - q| / (2^W - 1). The definition is ours: the formula of
        2011.13392 is not known."""
        return self.mean_error_lsb / ((1 << self.word_bits) - 1)

    @property
    def rms(self) -> float:
        """RMS error of uniform codes over full scale."""
        return self.rms_lsb / ((1 << self.word_bits) - 1)


def measured_magnitude(before: Tensor, after: Tensor, word_bits: int = 8) -> tuple[float, float]:
    """(mu, rms) of a tensor of codes and what it became, over full scale 2^W - 1. Real codes are not uniform (zeros after a
    ReLU can only go up): print this beside `SramConfig.mu`. ValueError for unequal shapes or empty tensors."""
    if before.shape != after.shape or before.numel() == 0:
        raise ValueError(
            f"measured_magnitude: expected two non-empty tensors of one shape, got {list(before.shape)} and {list(after.shape)}"
        )
    delta = (after.double() - before.double()).abs() / ((1 << word_bits) - 1)
    return float(delta.mean()), float(delta.square().mean().sqrt())
