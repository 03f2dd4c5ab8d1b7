"""A thousand calls of each operator on spikes with arguments of every kind: each returns or explains itself."""

from __future__ import annotations

import random

import pytest
import torch
from neuron_cases import DTYPES, leaf

from pyaccel import ops
from pyaccel.reference.neuron import state_dtype


def any_tensor(rng: random.Random) -> torch.Tensor:
    shape = [rng.choice([0, 1, 2, 3, 4, 17]) for _ in range(rng.randrange(0, 6))]
    tensor = torch.ones(
        shape,
        dtype=rng.choice([*DTYPES, torch.float32, torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8]),
    )
    if rng.random() < 0.3 and tensor.dim() > 1:
        tensor = tensor.transpose(rng.randrange(tensor.dim()), rng.randrange(tensor.dim()))
    if rng.random() < 0.3 and tensor.dim():
        tensor = tensor[..., :: rng.choice([1, 2])]
    if rng.random() < 0.2 and tensor.is_floating_point():
        tensor = leaf(tensor)
    return tensor


def anything(rng: random.Random):
    return rng.choice([
        lambda: any_tensor(rng), lambda: any_tensor(rng), lambda: None, lambda: rng.choice([0, 1, -1, 3, 1 << 40, -(1 << 70), 10**400]),
        lambda: rng.choice([0.5, 0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf")]), lambda: rng.choice(["exact", "", "signed", "x"]),
        lambda: [], lambda: object(), lambda: b"", lambda: True, lambda: 1j, lambda: (2, 1),
    ])()  # fmt: skip


def right(rng: random.Random, op: str) -> dict:
    """Arguments that fit together, of which some are then replaced."""
    dtype = rng.choice(DTYPES)
    state = state_dtype(dtype)

    def spikes(*shape):
        bits = (torch.rand(shape) < 0.4).to(dtype)
        return leaf(bits) if rng.random() < 0.5 else bits

    lead = [rng.choice([0, 1, 2, 5]) for _ in range(rng.randrange(1, 3))]
    if op == "stdb_lif":
        step = [rng.choice([0, 1, 2, 5, 33]) for _ in range(rng.randrange(0, 4))]
        return dict(current=spikes(rng.randrange(0, 5), *step), membrane=torch.zeros(step, dtype=state), since=torch.ones(step, dtype=torch.int32),
                    leak=0.9, threshold=0.7, alpha=0.3, beta=0.01, form=rng.choice(["exact", "fp32_underflow"]))  # fmt: skip
    if op == "pack_spikes":
        return dict(spikes=spikes(rng.randrange(1, 5), *lead))
    if op == "unpack_spikes":
        return dict(packed=ops.pack_spikes(torch.ones(3, 17)), shape=(3, 17), dtype=dtype)
    if op == "spike_linear":
        return dict(
            spikes=spikes(*lead, 5),
            weight=leaf(torch.randn(3, 5).to(dtype)),
            bias=torch.zeros(3, dtype=dtype),
            kind="binary",
        )
    if op == "spike_avg_pool2d":
        return dict(spikes=spikes(*lead, 3, 6, 7), kernel_size=2)
    return dict(spikes=spikes(*lead, 4, 6, 7), weight=leaf(torch.randn(6, 2, 3, 3).to(dtype)), bias=torch.zeros(6, dtype=dtype), stride=1,
                padding=1, dilation=(1, 2), groups=2, kind=rng.choice(["binary", "signed", "pooled"]))  # fmt: skip


@pytest.mark.parametrize(
    "op", ["stdb_lif", "pack_spikes", "unpack_spikes", "spike_conv2d", "spike_linear", "spike_avg_pool2d"]
)
def test_a_thousand_random_calls_return_or_explain_themselves(op):
    rng = random.Random(op)
    torch.manual_seed(0)
    returned = explained = 0
    for n in range(1000):
        arguments = right(rng, op)
        for name in rng.sample(sorted(arguments), min(len(arguments), rng.choice([0, 1, 1, 2, 4]))):
            arguments[name] = anything(rng)
        try:
            out = getattr(ops, op)(**arguments)
            out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
            if out:
                torch.autograd.backward(out, [torch.ones_like(o) for o in out])
            returned += 1
        except (TypeError, ValueError, RuntimeError) as error:  # torch's own layers speak for themselves
            assert len(str(error)) > 20 or not op.startswith(("stdb", "pack", "unpack")), f"call {n}: {error}"
            if op in ("stdb_lif", "pack_spikes"):
                assert str(error).startswith(f"{op}: "), f"call {n}: {error}"
            explained += 1
    assert returned > 150 and explained > 150
