"""Parts of `source_free`: its network, its rounds of batches, what it measures of a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyaccel.data import Batches
from pyaccel.nn import PrototypeMemory, self_entropy
from pyaccel.training.evaluate import evaluating


class SourceNet(nn.Module):
    """Features and the paper's head: two linear layers without anything between them."""

    def __init__(self, features: nn.Module, values: int, classes: int, bottleneck: int = 256):
        super().__init__()
        self.features, self.values = features, values
        self.head = nn.Sequential(nn.Linear(values, bottleneck), nn.Linear(bottleneck, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Rounds:
    """The batches of as many epochs as it takes, in rounds of `steps` batches: `Trainer` evaluates after each round.

    The published loop counts steps and looks every 1,000 of them, whatever an epoch holds.
    """

    def __init__(self, batches: Batches, steps: int):
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, number: int, first_batch: int = 0):
        position, end = number * self.steps + first_batch, (number + 1) * self.steps
        while position < end:
            epoch, batch = divmod(position, len(self.batches))
            for found in self.batches.epoch(epoch, batch):
                yield found
                position += 1
                if position == end:
                    return


def predict(model: nn.Module, batches: Batches, device: torch.device) -> tuple[Tensor, Tensor]:
    """Probabilities `[N, K]` and, of a `SourceNet`, features `[N, D]` of all images, on the CPU."""
    probabilities, features = [], []
    with evaluating(model), torch.inference_mode():
        for batch in batches.epoch(0):
            images = batch.images.to(device)
            if isinstance(model, SourceNet):
                values = model.features(images)
                features.append(values.float().cpu())
                probabilities.append(model.head(values).float().softmax(1).cpu())
            else:
                probabilities.append(model(images).float().softmax(1).cpu())
    return torch.cat(probabilities), torch.cat(features) if features else torch.empty(0)


def diagnose(net: SourceNet, batches: Batches, labels: Tensor, capacity: int, device: torch.device) -> dict[str, float]:
    """Of the source classifier on the target's images, `batches` in order, plain, in evaluation mode: does what the
    method builds on hold?

    Accuracy in the quartiles of self-entropy, lowest first; of the prototypes' labels; of those that the filter keeps
    and drops (nan for none); the share kept; eta; fewest and most prototypes of a class.
    """
    probabilities, features = predict(net, batches, device)
    right = (probabilities.argmax(1) == labels).double()
    order = self_entropy(probabilities).argsort(stable=True)
    memory = PrototypeMemory(probabilities.shape[1], features.shape[1], capacity)
    memory.update(features, probabilities)
    parts = [memory.label(part) for part in features.split(1024)]
    found, keep = (torch.cat(part) for part in zip(*parts, strict=True))
    agreed = (found == labels).double()
    return {
        **{f"quartile_{i + 1}": float(right[part].mean()) for i, part in enumerate(order.tensor_split(4))},
        "argmax": float(right.mean()),
        "prototypes": float(agreed.mean()),
        "kept": float(keep.double().mean()),
        "accuracy_kept": float(agreed[keep].mean()),
        "accuracy_dropped": float(agreed[~keep].mean()),
        "eta": float(memory.threshold),
        "fewest": float(memory.counts.min()),
        "most": float(memory.counts.max()),
    }
