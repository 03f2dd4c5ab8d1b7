"""What the networks of one paper have in common besides their layers: neuron, coding, read-out, pooling, dropout."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Form:
    """Defaults of `build`, most of which its options override.

    Args:
        neuron: of the spiking form: "bntt", "lif", "delayed" or "stdb" (see `SpikingNetwork`).
        steps, leak, gain: time steps, what remains of a membrane after one, and the encoder's gain.
        mean_readout: logits are the mean of the read-out over time; False: its sum.
        norm: of the artificial form, "batch" or "none".
        pool: of the artificial form, "average" or "max"; the spiking form averages.
        bias: fully connected layers of the artificial form have biases (and no normalisation).
        dropout: probabilities after marked convolutions and after hidden fully connected layers.
        hybrid_start: initial weights N(0, 2/(k^2 outputs)) in convolutions and N(0, 0.01^2) elsewhere, as 2005.01807's
            code; otherwise Kaiming's, and Xavier's uniform with gain 2 for a spiking form born with BNTT.
    """

    neuron: str = "bntt"
    steps: int = 25
    leak: float = 0.95
    gain: float = 0.5
    mean_readout: bool = True
    norm: str = "batch"
    pool: str = "average"
    bias: bool = False
    dropout: tuple[float, float] = (0.0, 0.0)
    hybrid_start: bool = False


BNTT = Form()
HYBRID = Form(
    neuron="stdb", steps=100, leak=1.0, gain=1.0, mean_readout=False, norm="none", dropout=(0.3, 0.5), hybrid_start=True
)
HYBRID_RESNET = replace(HYBRID, gain=0.9)
ROBUST = replace(
    HYBRID, neuron="delayed", steps=175, leak=0.99, mean_readout=True, dropout=(0.2, 0.0), hybrid_start=False
)
PLAIN = Form(pool="max", bias=True, dropout=(0.0, 0.5))
CROSSBAR = Form(pool="max", norm="none")
