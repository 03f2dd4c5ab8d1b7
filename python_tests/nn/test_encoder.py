"""`nn.PoissonEncoder`: fresh draws at every pass, the same draws after a resume, a stream of its own for evaluation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from pyaccel import nn, ops

IMAGE = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_it_is_its_operator_with_a_stream_a_pass():
    encoder = nn.PoissonEncoder(7, 0.5, seed=3, stream=10)
    for k in range(3):
        assert torch.equal(encoder(IMAGE), ops.poisson_encode(IMAGE, 7, gain=0.5, seed=3, stream=11 + k))
    assert encoder.passes == 3
    assert torch.equal(encoder.eval()(IMAGE), ops.poisson_encode(IMAGE, 7, gain=0.5, seed=3, stream=10))


def test_every_training_pass_draws_afresh_and_evaluation_does_not():
    encoder = nn.PoissonEncoder(7)
    first, second = encoder(IMAGE), encoder(IMAGE)
    assert not torch.equal(first, second)
    encoder.eval()
    assert torch.equal(encoder(IMAGE), encoder(IMAGE)) and encoder.passes == 2
    assert not torch.equal(encoder(IMAGE), first)


def test_set_step_repeats_a_pass():
    encoder = nn.PoissonEncoder(7, seed=1)
    draws = [encoder(IMAGE) for _ in range(4)]
    encoder.set_step(2)
    assert torch.equal(encoder(IMAGE), draws[2]) and torch.equal(encoder(IMAGE), draws[3])
    encoder.eval()
    evaluated = encoder(IMAGE)
    encoder.set_step(0)
    assert torch.equal(encoder(IMAGE), evaluated)


def test_a_resumed_run_draws_what_the_uninterrupted_one_does():
    encoder = nn.PoissonEncoder(7, seed=1)
    encoder(IMAGE), encoder(IMAGE)
    assert list(encoder.state_dict()) == ["passes"]
    other = nn.PoissonEncoder(7, seed=1)
    other.load_state_dict(copy.deepcopy(encoder.state_dict()))
    copied, pickled = copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))
    wanted = encoder(IMAGE)
    for resumed in (other, copied, pickled):
        assert torch.equal(resumed(IMAGE), wanted)


def test_sample_ids_make_the_batch_irrelevant():
    encoder, ids = nn.PoissonEncoder(7).eval(), torch.tensor([5, 9, 2, 7])
    whole = encoder(IMAGE, ids)
    parts = torch.cat([encoder(IMAGE[:1], ids[:1]), encoder(IMAGE[1:], ids[1:])], 1)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, encoder(IMAGE))


def test_seed_stream_gain_and_steps_matter():
    draw = {k: nn.PoissonEncoder(7, **dict(dict(gain=0.5) | o)).eval()(IMAGE) for k, o in dict(
        plain={}, seed=dict(seed=1), stream=dict(stream=1), gain=dict(gain=1.0)).items()}  # fmt: skip
    for name in ("seed", "stream", "gain"):
        assert not torch.equal(draw["plain"], draw[name])
    encoder = nn.PoissonEncoder(7).eval()
    assert encoder(IMAGE, steps=3).shape == (3, 4, 3, 5, 5) and torch.equal(encoder(IMAGE, steps=3), encoder(IMAGE)[:3])
    assert encoder(IMAGE, steps=0).shape == (0, 4, 3, 5, 5)


def test_the_rate_is_gain_times_pixel_with_its_sign():
    image = torch.linspace(-1.5, 1.5, 13).expand(200, 13).contiguous()
    rate = nn.PoissonEncoder(500, 0.8)(image).mean((0, 1))
    assert (rate - (0.8 * image[0]).clamp(-1, 1)).abs().max() < 0.01


def test_the_gradient_of_the_image_is_gain_summed_over_steps():
    image = IMAGE.clone().requires_grad_()
    nn.PoissonEncoder(7, 0.5)(image).sum().backward()
    assert torch.equal(image.grad, torch.full_like(image, 3.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_change_of_dtype_leaves_key_and_passes_alone(dtype):
    encoder = nn.PoissonEncoder(7, seed=5).to(dtype)
    encoder(IMAGE.to(dtype))
    assert encoder.key.dtype == encoder.passes.dtype == torch.int64 and encoder.passes == 1


@pytest.mark.parametrize("training", [True, False])
def test_it_is_compiled_without_breaks_once_for_all_passes(training):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, encoder = (nn.PoissonEncoder(7, seed=2).train(training) for _ in range(2))
    compiled = torch.compile(encoder, fullgraph=True, backend=counter)
    for _ in range(3):
        assert torch.equal(compiled(IMAGE), plain(IMAGE))
    assert counter.frame_count == 1 and encoder.passes == plain.passes == (3 if training else 0)


def test_meta():
    assert nn.PoissonEncoder(7).to("meta")(IMAGE.to("meta")).shape == (7, 4, 3, 5, 5)


def test_seeds_of_64_bits():
    encoder = nn.PoissonEncoder(7, seed=(1 << 64) - 1).eval()
    assert torch.equal(encoder(IMAGE), ops.poisson_encode(IMAGE, 7, gain=0.5, seed=(1 << 64) - 1))


@pytest.mark.parametrize("stream", [-1, 1 << 32])
def test_streams_outside_32_bits_are_refused(stream):
    with pytest.raises(ValueError, match="stream must be in 0"):
        nn.PoissonEncoder(7, stream=stream)(IMAGE)


def test_wrong_steps_are_told():
    with pytest.raises(ValueError, match="poisson_encode: steps must be in 0..65536, got -1"):
        nn.PoissonEncoder(-1)(IMAGE)


def test_repr():
    assert repr(nn.PoissonEncoder(25)) == "PoissonEncoder(steps=25, gain=0.5)"
