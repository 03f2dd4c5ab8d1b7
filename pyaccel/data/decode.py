"""One encoded image to pixels: whole, resized and cropped in the middle, or a random part of it resized."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# (width, height) of an image -> left, top, right, bottom of the part to keep.
Box = Callable[[int, int], tuple[int, int, int, int]]


def decode(
    source: str | os.PathLike | bytes,
    size: int | None = None,
    *,
    resize: int | None = None,
    box: Box | None = None,
    name: object = None,
) -> Tensor:
    """An image as RGB, uint8 [3, H, W].

    source: a file, or its content, which errors then call `name`. size: the shorter side is resized to `resize`
    (default: size; bilinear, antialiased) and the centre size x size kept; None: nothing is resized. box: instead, this
    part of the image is resized to size x size; a JPEG much larger than needed is then decoded at a half, a quarter or
    an eighth of its size, which saves most of the time.
    FileNotFoundError; ValueError for what cannot be decoded or has more than 8 bits.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('decoding image files needs Pillow: pip install "pyaccel[images]"') from error
    name = source if name is None else name
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if opened.mode[0] in "IF":  # Pillow would clip 16 and 32 bits to 255 without a word.
                raise ValueError(f"its pixels have more than 8 bits (Pillow mode {opened.mode})")
            part = box(*opened.size) if box is not None else None
            if part is not None:
                part = _draft(opened, part, size)
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, ValueError, struct.error and more.
        raise ValueError(f"{name}: cannot decode this image ({error}); replace or remove the file") from error
    if part is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=part)
    elif size is not None:
        width, height = (side * (resize or size) // min(image.size) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def _draft(opened, part: tuple[int, int, int, int], size: int) -> tuple[float, ...]:
    """Make a JPEG decode at the smallest scale at which `part` still has `size` pixels a side; the part at that scale."""
    width, height = opened.size
    shrink = min((part[2] - part[0]) / size, (part[3] - part[1]) / size)
    if opened.format == "JPEG" and shrink >= 2:
        opened.draft("RGB", (math.ceil(width / shrink), math.ceil(height / shrink)))
    across, down = opened.size[0] / width, opened.size[1] / height
    return part[0] * across, part[1] * down, part[2] * across, part[3] * down


def random_part(word: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Box:
    """The box of a random resized crop, a pure function of `word` and the size of the image.

    The part has `scale` (lowest, highest) of the image's area and `ratio` of width to height (uniform in area and in
    the logarithm of the ratio; ten tries to fit, then the largest centred part of an allowed ratio): the augmentation
    of Szegedy et al., Going Deeper with Convolutions, section 6.
    """

    def box(width: int, height: int) -> tuple[int, int, int, int]:
        draws = np.random.Philox(key=word).random_raw(40).astype(np.float64) * 2.0**-64
        for area, aspect, x, y in draws.reshape(10, 4):
            target = width * height * (scale[0] + (scale[1] - scale[0]) * area)
            aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * aspect)
            w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    return box
