"""Energy of precision-scalable multiply-accumulate units, and compression (quanos, section 5).

The paper's own per-precision table is unknown and nothing here speaks in its name. Energies are model outputs or a
user's table; measured time of a simulation on a CPU or GPU is never one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyaccel.hardware.cost import LayerCost

MODES = ("data_gating", "subword_parallel")
MODELS = ("physical", "multiplier_estimate", "linear45", "table")
SUPPORTED = (2, 4, 8, 16)  # precisions of the unit; a width between runs at the next larger one
# pJ a multiplication, low and high end: an estimate table for 28/22 nm (stillwater-sc/esim), not silicon; quadratic
MULTIPLIER_PJ = {2: (0.035, 0.050), 4: (0.140, 0.200), 8: (0.560, 0.800), 12: (1.26, 1.80), 16: (2.24, 3.20)}


@dataclass(frozen=True)
class MacEnergy:
    """Energy of one multiply-accumulate at a precision of b bits. Immutable.

    Models:
        "physical" (default; relative to the 16-bit MAC): a 16x16 array multiplier switches about (b/16)^2 of its cells;
            data gating holds the unused low inputs at zero, one MAC a cycle: alpha + (1 - alpha) (b/16)^2;
            subword parallel runs 16/b products in the same array: (alpha b/16 + (1 - alpha) (b/16)^2) (V(b)/V_nom)^2.
        "multiplier_estimate" (pJ): the middle of the estimate table `MULTIPLIER_PJ`; exactly the case alpha = 0.
        "linear45" (pJ, 45 nm, from memory of later papers of the group): 3.1 b/32 + 0.1.
        "table": `table[mode][bits]`, the only route to somebody else's figures.

    Attributes:
        model: which of them; every table of results must name it (`label`).
        mode: "subword_parallel" or "data_gating".
        alpha: fraction of a 16-bit MAC's energy in clock, registers and control (unitless, 0..1; our constant, 0.1).
        voltage: bits -> V(b)/V_nom at constant throughput (unitless; subword parallel only; default 1 everywhere).
        table: {mode: {bits: energy}} for model "table"; any unit.
    """

    model: str = "physical"
    mode: str = "subword_parallel"
    alpha: float = 0.1
    voltage: Mapping[int, float] = field(default_factory=dict)
    table: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"MacEnergy: model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.mode not in MODES:
            raise ValueError(f"MacEnergy: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"MacEnergy: alpha must be in 0..1, got {self.alpha}")
        if self.model == "table" and not self.table.get(self.mode):
            raise ValueError(f"MacEnergy: model 'table' needs table[{self.mode!r}] = {{bits: energy}}, got {dict(self.table)}")

    @property
    def label(self) -> str:
        """What a table of results must say about its energies."""
        extra = f", alpha={self.alpha:g}" if self.model == "physical" else ""
        return f"{self.model}, {self.mode}{extra}"

    def energy(self, weight_bits: int, activation_bits: int | None = None) -> float:
        """Energy of one MAC. One width: both operands have it.

        Widths between the supported {2, 4, 8, 16} (of a table: its own) run at the next larger one; data gating in the
        physical model gates any width exactly. Unequal widths: data gating (kw ka / 256), all others the larger.
        """
        activation_bits = weight_bits if activation_bits is None else activation_bits
        for bits in (weight_bits, activation_bits):
            if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
                raise ValueError(f"MacEnergy: bits must be a whole number in 1..16, got {bits!r}")
        larger = max(weight_bits, activation_bits)
        if self.model == "linear45":
            return 3.1 * larger / 32 + 0.1
        if self.model == "table":
            known = self.table[self.mode]
            return known[_next(known, larger)]
        if self.model == "multiplier_estimate":
            return sum(MULTIPLIER_PJ[_next(MULTIPLIER_PJ, larger)]) / 2
        if self.mode == "data_gating":
            return self.alpha + (1 - self.alpha) * weight_bits * activation_bits / 256
        bits = _next(SUPPORTED, larger)
        share = bits / 16
        return (self.alpha * share + (1 - self.alpha) * share**2) * self.voltage.get(bits, 1.0) ** 2


def _next(widths, bits: int) -> int:
    fitting = [w for w in sorted(widths) if w >= bits]
    if not fitting:
        raise ValueError(f"MacEnergy: the table has no precision of {bits} bits or more, only {sorted(widths)}")
    return fitting[0]


def compression(layers: Sequence[LayerCost], reference: int = 32, *, stored: bool = False) -> float:
    """reference * sum n_l / sum n_l k_l, against weights of `reference` (32, 16 or 8) bits.

    `stored=True`: with the width that codes are stored in (the next of 1, 2, 4, 8, 16) instead of the nominal one.
    """
    if reference not in (32, 16, 8):
        raise ValueError(f"compression: reference must be 32, 16 or 8 bits, got {reference}")
    total = sum(layer.weights for layer in layers)
    if total == 0:
        raise ValueError("compression: no weights in the layers given")
    held = sum(layer.weights * (_container(layer.weight_bits) if stored else layer.weight_bits) for layer in layers)
    return reference * total / held


def _container(bits: int) -> int:
    return next((w for w in (1, 2, 4, 8, 16) if w >= bits), 32)


def efficiency(layers: Sequence[LayerCost], energy: MacEnergy, baseline_bits: int = 16) -> float:
    """E(baseline) / E(model), E = sum M_l E_MAC(kw_l, ka_l); the baseline runs every layer at `baseline_bits`."""
    spent = sum(layer.macs * energy.energy(layer.weight_bits, layer.activation_bits) for layer in layers)
    if spent == 0:
        raise ValueError("efficiency: no multiply-accumulates in the layers given")
    return sum(layer.macs for layer in layers) * energy.energy(baseline_bits) / spent
