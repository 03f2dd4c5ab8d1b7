"""What the image-classifier recipes share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pyaccel import models
from pyaccel.data.images import ImageSet
from pyaccel.recipes.classifier import (
    ClassifierConfig,
    Normalised,
    check_choices,
    check_fields,
    chosen,
    open_data,
    plain_batches,
    split,
    train_classifier,
)

CONFIG = ClassifierConfig(
    preset="test", model="mlp", mean=None, std=None, crop_padding=0, flip=False, epochs=2, batch_size=8, device="cpu"
)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    pixels = torch.randint(0, 100, (64, 1, 8, 8), dtype=torch.uint8, generator=generator)
    pixels[labels == 1, :, :4] += 120  # two classes that any network can tell apart
    return ImageSet(pixels, labels, "01", "two")


def train(images, config, out, resume="auto"):
    torch.manual_seed(1)
    model = models.build("mlp", classes=2, input_shape=(1, 8, 8), spiking=False)
    return model, train_classifier(model, images, images, config, seed=0, out=out, resume=resume, name="test")


def test_training_learns_logs_and_resumes_to_the_same_bits(images, tmp_path, capsys):
    model, history = train(images, CONFIG, tmp_path / "whole")
    assert history.epoch == 2 and history.rows[-1]["eval_accuracy"] == 1.0
    assert "test, seed 0: epoch 2/2" in capsys.readouterr().err
    again, _ = train(images, CONFIG, tmp_path / "whole")  # finished already: nothing is trained
    assert "seed 0" not in capsys.readouterr().err
    for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_parts_of_a_set_are_disjoint_fixed_and_mixed(images):
    rest, selection = split(images, 16)
    assert (len(rest), len(selection)) == (48, 16)
    ours = {tuple(images[i][0].flatten().tolist()) for i in range(64)}
    parts = [{tuple(part[i][0].flatten().tolist()) for i in range(len(part))} for part in (rest, selection)]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == ours
    assert 0 < selection.labels.sum() < 16  # both classes
    assert torch.equal(split(images, 16)[1].images, selection.images)
    assert len(chosen(images, 10)) == 10 and chosen(images, None) is images and chosen(images, 99) is images
    for count in (0, 64):
        with pytest.raises(ValueError, match="leaves nothing of 64"):
            split(images, count)


def test_normalised_equals_the_pipeline_and_passes_gradients(images):
    config = replace(CONFIG, mean=(0.3,), std=(0.2,))
    model = Normalised(nn.Flatten(), config.mean, config.std)
    theirs = next(iter(plain_batches(config, images).epoch(0)))
    raw = next(iter(plain_batches(config, images, normalise=False).epoch(0)))
    pixels = raw.images.requires_grad_()
    torch.testing.assert_close(model(pixels), theirs.images.flatten(1))
    model(pixels).sum().backward()
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, 5.0))
    assert torch.equal(Normalised(nn.Identity(), None, None)(raw.images), raw.images)


def test_errors_say_what_to_do(monkeypatch):
    monkeypatch.delenv("PYACCEL_DATA", raising=False)
    with pytest.raises(ValueError, match=r"the preset test of someone trains on CIFAR-10 and was given no data: downl"):
        open_data(CONFIG, "someone")
    with pytest.raises(ValueError, match="trains on PACS and was given no data: name the folder"):
        open_data(CONFIG, "someone", "PACS")
    with pytest.raises(ValueError, match=r"seeds: expected at least one value and none twice, got \[0, 0\]"):
        check_fields(replace(CONFIG, seeds=(0, 0)))
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        check_fields(replace(CONFIG, epochs=0))
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        check_fields(replace(CONFIG, width=0))
    with pytest.raises(ValueError, match="kinds: expected some of a, b, got c"):
        check_choices("kinds", ("a", "c"), ("a", "b"))
