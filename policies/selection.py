"""Selection: which S of an image's M copies the network is trained on (the settings `keep` and `keep_by`).

Wu et al. ("On the generalization effects of linear transformations in data augmentation", ICML 2020) draw copies with
random operations and train on those that the network finds hard: an adversary for each image, without a controller.
"""

import torch
from torch import Tensor


def chosen_copies(
    rule: str, S: int, exponential_NM: Tensor, loss_NM: Tensor, teacher_loss_NM: Tensor | None = None
) -> Tensor:
    """The numbers of the copies to train on, n * M + m in rising order, int64 (N * S,).

    rule: "loss", the S largest losses; "margin", the S largest differences from the teacher's loss; "weighted", drawn
    without replacement with probabilities proportional to the losses; "random", drawn uniformly, as a control.
    exponential_NM: independent draws of the standard exponential distribution. The smallest of draws divided by weights
    is each one's with a probability proportional to its weight, and so are the smallest of those that remain.
    """
    if rule == "loss":
        rank_NM = -loss_NM
    elif rule == "margin":
        rank_NM = teacher_loss_NM - loss_NM
    elif rule == "weighted":
        rank_NM = exponential_NM / loss_NM.clamp(min=torch.finfo(loss_NM.dtype).tiny)
    else:
        rank_NM = exponential_NM
    N, M = loss_NM.shape
    chosen_NS = rank_NM.argsort(dim=1, stable=True)[:, :S].sort(1).values
    return (chosen_NS + torch.arange(0, N * M, M, device=chosen_NS.device)[:, None]).flatten()
