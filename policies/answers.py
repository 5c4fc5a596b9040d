"""A network's answers to the copies of a batch, as the controller's reward and the selection of copies need them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config


class Answers(NamedTuple):
    """Of each copy: its loss and what the network contributes to the reward, float32; whether it was classified right.

    The contribution is the loss or, with `reward_loss: nonsaturating`, log(1 - p) for the label's probability p, whose
    slope is largest where the network is sure. TeachAugment minimises its negative.
    """

    loss_B: Tensor
    reward_B: Tensor
    right_B: Tensor

    @classmethod
    def of(cls, logits_BC: Tensor, labels_B: Tensor, config: Config) -> "Answers":
        """Only loss_B has a gradient."""
        loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=config.label_smoothing)
        logits_BC = logits_BC.detach()
        reward_B = loss_B.detach()
        if config.reward_loss == "nonsaturating":
            others_BC = logits_BC.scatter(1, labels_B[:, None], -torch.inf)
            reward_B = others_BC.logsumexp(1) - logits_BC.logsumexp(1)
        return cls(loss_B, reward_B, logits_BC.argmax(1) == labels_B)
