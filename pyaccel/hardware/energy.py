"""Energy of a spiking network's arithmetic beside that of the same network without spikes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PICO_TO_NANO = 1e-3


@dataclass(frozen=True)
class SpikeEnergy:
    """Energy of the arithmetic alone: no memory access, no control, no static power.

    A dense network pays one multiply-accumulate a connection; a spiking one pays one addition for each input that is
    not zero, at each step::

        E_ANN = sum over layers of macs * E_MAC
        E_SNN = sum over layers of macs * rate * E_AC       rate: non-zero inputs over T steps / inputs, of one image

    The rate is the incoming one, that of the layer's own inputs; a signed spike and a pooled one (a quarter) cost one
    addition as a whole spike does. The constants below are those that papers of this field quote for 45 nm CMOS at
    0.9 V. Their provenance here is REMEMBERED: they come from memory of the literature, not from a document at hand;
    take them for this library's constants and name the set with every result.

    Args:
        name: what reports call this set.
        mac: E_MAC, one multiplication and the addition of its product, pJ.
        accumulate: E_AC, one addition, pJ.
        source: where the two values come from, with the mark of their provenance.
    """

    name: str
    mac: float
    accumulate: float
    source: str

    def __post_init__(self):
        for field in ("mac", "accumulate"):
            if not getattr(self, field) > 0:
                raise ValueError(f"SpikeEnergy: {field} must be positive (pJ), got {getattr(self, field)}")

    def ann(self, macs: Sequence[float]) -> float:
        """E_ANN of one image, nJ. macs: multiply-accumulates of each layer, dense, once."""
        return sum(macs) * self.mac * PICO_TO_NANO

    def snn(self, macs: Sequence[float], rates: Sequence[float]) -> float:
        """E_SNN of one image over all steps, nJ. rates: incoming rate of each layer. ValueError for unequal lengths."""
        if len(macs) != len(rates):
            raise ValueError(f"SpikeEnergy.snn: expected one rate a layer, got {len(rates)} for {len(macs)} layers")
        return sum(m * r for m, r in zip(macs, rates, strict=True)) * self.accumulate * PICO_TO_NANO

    def normalisation(self, neuron_steps: float) -> float:
        """What normalisation adds in evaluation, nJ: one multiply-add for each neuron and step that is normalised.

        It cannot be folded into the weights for free where it differs between steps (BNTT): that needs T copies.
        """
        return neuron_steps * self.mac * PICO_TO_NANO


FLOAT32_45NM = SpikeEnergy(
    "float32",
    mac=4.6,
    accumulate=0.9,
    source="REMEMBERED: 45 nm, 32-bit floating point; 3.7 pJ multiplication + 0.9 pJ addition",
)
INT32_45NM = SpikeEnergy(
    "int32",
    mac=3.2,
    accumulate=0.1,
    source="REMEMBERED: 45 nm, 32-bit integers; 3.1 pJ multiplication + 0.1 pJ addition",
)
