from __future__ import annotations

import pytest

from pyaccel.hardware.energy import FLOAT32_45NM, INT32_45NM, SpikeEnergy


def test_energies_by_hand():
    energy = SpikeEnergy("round", mac=4.0, accumulate=0.5, source="by hand")
    macs = [1000, 2000]
    assert energy.ann(macs) == pytest.approx(3000 * 4.0 / 1000)  # pJ to nJ
    assert energy.snn(macs, [2.0, 0.25]) == pytest.approx((2000 + 500) * 0.5 / 1000)
    assert energy.normalisation(700) == pytest.approx(2.8)


def test_a_dense_input_over_one_step_costs_an_addition_a_connection():
    assert FLOAT32_45NM.snn([10], [1.0]) / FLOAT32_45NM.ann([10]) == pytest.approx(0.9 / 4.6)


def test_the_two_sets_are_the_specification_s_and_say_where_they_come_from():
    assert (FLOAT32_45NM.mac, FLOAT32_45NM.accumulate) == (4.6, 0.9)
    assert (INT32_45NM.mac, INT32_45NM.accumulate) == (3.2, 0.1)
    assert all("REMEMBERED" in energy.source for energy in (FLOAT32_45NM, INT32_45NM))


def test_errors():
    with pytest.raises(ValueError, match="expected one rate a layer, got 1 for 2 layers"):
        FLOAT32_45NM.snn([1, 2], [1.0])
    with pytest.raises(ValueError, match=r"mac must be positive \(pJ\), got 0"):
        SpikeEnergy("none", mac=0, accumulate=1, source="nowhere")
