"""A network's answers to the copies of a batch, as the controller's reward and the selection of copies need them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config


class MixedLabels(NamedTuple):
    """The labels of copies that are mixed from two images: `share` (0 to 1) of the first, the rest of the second."""

    first_B: Tensor
    second_B: Tensor
    share: float

    def select(self, numbers: Tensor) -> "MixedLabels":
        return MixedLabels(self.first_B[numbers], self.second_B[numbers], self.share)


class Answers(NamedTuple):
    """Of each copy: its loss and what the network contributes to the reward, float32; whether it was classified right.

    The contribution is the loss or, with `reward_loss: nonsaturating`, log(1 - p) for the label's probability p, whose
    slope is largest where the network is sure. TeachAugment minimises its negative.

    Of a mixed copy, both are those for each of its two labels, weighted by their shares; the cross-entropy is then the
    one of soft targets. It is right where the label with the larger share was found.
    """

    loss_B: Tensor
    reward_B: Tensor
    right_B: Tensor

    @classmethod
    def of(cls, logits_BC: Tensor, labels_B: Tensor | MixedLabels, config: Config) -> "Answers":
        """Only loss_B has a gradient."""
        if isinstance(labels_B, MixedLabels):
            share = labels_B.share
            first, second = (cls.of(logits_BC, labels, config) for labels in (labels_B.first_B, labels_B.second_B))
            loss_B, reward_B = (share * a + (1 - share) * b for a, b in zip(first[:2], second[:2], strict=True))
            return cls(loss_B, reward_B, (first if share >= 0.5 else second).right_B)
        loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=config.label_smoothing)
        logits_BC = logits_BC.detach()
        reward_B = loss_B.detach()
        if config.reward_loss == "nonsaturating":
            others_BC = logits_BC.scatter(1, labels_B[:, None], -torch.inf)
            reward_B = others_BC.logsumexp(1) - logits_BC.logsumexp(1)
        return cls(loss_B, reward_B, logits_BC.argmax(1) == labels_B)
