"""Ways to transform the images of another program's training loop, each image with operations of its own."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import policies
from augmentations import Augment, apply

try:
    from kornia.augmentation.auto import RandAugment as KorniaRandAugment
except ImportError:
    KorniaRandAugment = None

READY = "apply, the plan is ready"
WARM_UP = 30  # batches, after which scratch memory has its size


class Images(Dataset):
    """Images, each transformed when it is read."""

    def __init__(self, images_BCHW: Tensor, transform: Callable[[Tensor], Tensor]):
        self.images_BCHW, self.transform = images_BCHW, transform

    def __len__(self) -> int:
        return len(self.images_BCHW)

    def __getitem__(self, number: int) -> Tensor:
        return self.transform(self.images_BCHW[number])


def transforms(images_BCHW: Tensor, device: torch.device, workers: int) -> dict[str, Callable[[], Any]]:
    """By name, what transforms the batch: `apply` with plans that are ready, and the transforms that draw them."""
    on_device, augment, batched = images_BCHW.to(device), Augment(), policies.transform("randaugment")
    plans = itertools.cycle([augment.plan(len(images_BCHW), tuple(images_BCHW.shape[-2:])) for _ in range(WARM_UP)])
    for _ in range(WARM_UP):
        apply(on_device, next(plans))
    found = {
        READY: lambda: apply(on_device, next(plans)),
        "Augment": lambda: augment(on_device),
        "RandAugment: policies.transform": lambda: batched(on_device),
    }
    per_image = Images(images_BCHW, v2.RandAugment(2, 9))
    for processes in sorted({0, workers}):
        options = {"num_workers": processes, "persistent_workers": processes > 0}
        loader = DataLoader(per_image, max(1, len(per_image) // max(1, processes)), **options)
        name = f"RandAugment: torchvision, image by image, {processes or 'no'} workers"
        found[name] = lambda loader=loader: list(loader)
    if KorniaRandAugment:
        kornia = KorniaRandAugment(n=2, m=9)
        found["RandAugment: kornia, float32"] = lambda: (kornia(on_device.float() / 255) * 255).to(torch.uint8)
    return found
