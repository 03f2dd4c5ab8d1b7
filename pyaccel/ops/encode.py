"""`poisson_encode`: images to spike trains, by counter-based draws."""

from __future__ import annotations

import torch
from torch import Tensor

from pyaccel import extension, reference
from pyaccel.ops import checks, options
from pyaccel.ops.library import register

STEPS = 1 << 16  # the counter has 16 bits for the time step


def poisson_encode(
    image: Tensor,
    steps: int,
    *,
    gain: float = 1.0,
    seed: int | Tensor,
    stream: int = 0,
    sample_ids: Tensor | None = None,
    first_step: int = 0,
) -> Tensor:
    """Signed Poisson code (2010.01729 and 2005.01807): at every step a pixel spikes with P = min(gain*|x|, 1), keeping x's sign.

    A draw depends on (seed, stream, sample id, step, pixel) alone: not on device, threads, batch split or chunk of time.
    The gradient of the image is `gain`, summed over steps (straight through).

    Args:
        image: `[B, ...]`, float32, bfloat16, float16 or float64; contiguous or channels-last. A NaN pixel never spikes.
        steps: T >= 0; first_step + T <= 65,536.
        seed, stream: the key, 64 bits, and the stream, 32 bits; `seed` may also be an int64 tensor `[seed, stream,
            first_step]` on the device of the image: compiled and captured graphs are then not specialised to the values.
        sample_ids: int64 `[B]` (values below 2^32), what to draw for; default: the position in the batch.

    Returns:
        spikes `[T, B, ...]` in {-1, 0, 1}, of the dtype and layout of `image`.
    """
    checks.floating("poisson_encode", "image", image, 1, "[B, ...]")
    checks.whole("poisson_encode", "steps", steps, 0, STEPS)
    gain = checks.number("poisson_encode", "gain", gain, above=0.0)
    if sample_ids is not None:
        checks.like("poisson_encode", "sample_ids", sample_ids, image.shape[:1], torch.int64, image.device)
    if isinstance(seed, Tensor):
        checks.like("poisson_encode", "seed", seed, (3,), torch.int64, image.device)
        if stream != 0 or first_step != 0:
            raise ValueError(
                "poisson_encode: a seed tensor [seed, stream, first_step] holds stream and first_step, "
                f"got stream={stream} and first_step={first_step} beside it; leave them out"
            )
        key = seed
    else:
        checks.whole("poisson_encode", "seed", seed, -(1 << 63), (1 << 64) - 1)
        checks.whole("poisson_encode", "stream", stream, 0, (1 << 32) - 1)
        checks.whole("poisson_encode", "first_step", first_step, 0, STEPS - steps)
        key = torch.tensor([seed - (1 << 64) if seed >= 1 << 63 else seed, stream, first_step], device=image.device)
    return _poisson_encode(image, sample_ids, key, gain, steps)


def _output(image: Tensor, steps: int) -> Tensor:
    image = options.dense_images(image)
    if image.is_contiguous():
        return image.new_empty((steps, *image.shape))
    return image.new_empty_strided((steps, *image.shape), (image.numel(), *image.stride()))


def _kernel(image, sample_ids, key, gain, steps):
    spikes = _output(image, steps)
    if spikes.numel() == 0:
        return spikes
    ids = None if sample_ids is None else sample_ids.contiguous()
    extension._C.neuron.encode(options.dense_images(image), ids, key.contiguous(), gain, spikes)
    return spikes


def _fake(image, sample_ids, key, gain, steps):
    return _output(image, steps)


def _fallback(image, sample_ids, key, gain, steps):
    seed, stream, first_step = key.tolist()
    out = reference.poisson_encode(
        image.detach(), steps, gain=gain, seed=seed, stream=stream, sample_ids=sample_ids, first_step=first_step
    )
    return _output(image, steps).copy_(out)


def _setup_context(ctx, inputs, output):
    ctx.gain = inputs[3]


def _backward(ctx, grad):
    return ctx.gain * grad.sum(0), None, None, None, None


_poisson_encode = register(
    "poisson_encode(Tensor image, Tensor? sample_ids, Tensor key, float gain, int steps) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    fallback=_fallback,
    setup_context=_setup_context,
    backward=_backward,
)
