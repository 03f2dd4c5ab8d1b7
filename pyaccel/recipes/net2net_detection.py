"""Mutual inference: do the networks of all stages agree on an image? Scores, thresholds, and the attack that knows.

The specification's section 6; definitions are this library's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Together(nn.Module):
    """Several networks on one image: logits [S, B, classes]."""

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks])


def jensen_shannon(logits: Tensor) -> Tensor:
    """J(x) = (1/S) sum_s KL(p_s || mean p), in nats: 0 .. log S. logits [S, B, classes] -> [B]."""
    logs = logits.log_softmax(-1)  # finite where a probability rounds to zero
    mean = logs.logsumexp(0) - math.log(len(logits))
    return (logs.exp() * (logs - mean)).sum(-1).mean(0).clamp_min(0)


def vote_disagreement(logits: Tensor) -> Tensor:
    """u(x) = 1 - (largest number of votes) / S. logits [S, B, classes] -> [B]."""
    votes = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
    return 1 - votes.amax(-1) / len(logits)


def unsureness(logits: Tensor) -> Tensor:
    """1 - max p of the last network alone: the control that needs no other one. logits [S, B, classes] -> [B]."""
    return 1 - logits[-1].softmax(-1).amax(-1)


SCORES = {"js": jensen_shannon, "vote": vote_disagreement, "maxprob": unsureness}


def auc(clean: Tensor, attacked: Tensor) -> float:
    """P(score of an attacked image > of a clean one) + half of P(equal): the area under the ROC curve."""
    below = torch.searchsorted(clean.double().sort().values, attacked.double(), right=False).double()
    equal = torch.searchsorted(clean.double().sort().values, attacked.double(), right=True).double() - below
    return float((below + equal / 2).mean() / len(clean))


def threshold(clean: Tensor, false_positives: float = 0.05) -> float:
    """The least score of `clean` above which lies at most this share of them: an image is flagged above it."""
    kept = math.ceil(len(clean) * (1 - false_positives) - 1e-9)
    return float(clean.double().sort().values[max(1, kept) - 1])


def flagged(scores: Tensor, limit: float) -> float:
    """Share of the images above the threshold."""
    return float((scores.double() > limit).double().mean())


def evading(logits: Tensor, labels: Tensor) -> Tensor:
    """What the adaptive attack ascends: the mean cross entropy of all networks, minus their disagreement J."""
    entropy = torch.stack([F.cross_entropy(each, labels) for each in logits]).mean()
    return entropy - jensen_shannon(logits).mean()
