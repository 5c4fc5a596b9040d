"""Sources of policies, which decide the operations on each image: one for each value of the setting `policy`.

A new source is a subclass of `sources.PolicySource` (most override only `_sample` or `_plan`), a row of SOURCES, and
its name in config.POLICIES.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from config import PER_IMAGE, Config
from policies.learned import ControllerPolicies, FrozenPolicies, fresh_controller, read_controller
from policies.published import AugMix, AutoAugmentPolicies, PublishedTransform, RandAugment, TrivialAugment
from policies.recorded import RecordedPolicies, read_policies
from policies.sources import PolicySource, RandomPolicies, Reward
from utils import did_you_mean


def _controller(config: Config, **options: Any) -> PolicySource:
    floor, end = config.entropy_floor, config.entropy_floor_end
    learning = {"lr": config.controller_lr, "entropy_bonus": config.entropy_bonus}
    learning["entropy_floors"] = (floor, floor if end is None else end)
    return ControllerPolicies(config.M, fresh_controller(config), config.ops, config.levels, **learning, **options)


# name -> the source for a config; options: clean_share and reward, which all sources take
SOURCES: dict[str, Callable[..., PolicySource]] = {
    "controller": _controller,
    "random": lambda c, **options: RandomPolicies(c.M, c.Q, c.K, c.ops, c.levels, **options),
    "none": lambda c, **options: PolicySource(c.M, c.Q, c.K, **options),
    "recorded": lambda c, **options: RecordedPolicies(c.M, read_policies(Path(c.policy_from)), **options),
    "frozen": lambda c, **options: FrozenPolicies(c.M, *read_controller(Path(c.policy_from)), **options),
    "trivialaugment": lambda c, **options: TrivialAugment(c.M, **options),
    "randaugment": lambda c, **options: RandAugment(c.M, c.randaugment_n, c.randaugment_m, **options),
    "autoaugment_cifar10": lambda c, **options: AutoAugmentPolicies(c.M, "cifar10", **options),
    "autoaugment_imagenet": lambda c, **options: AutoAugmentPolicies(c.M, "imagenet", **options),
    "augmix": lambda c, **options: AugMix(c.M, clean_first=c.jsd > 0, on_imagenet=c.dataset == "imagenet", **options),
}


def build_policies(config: Config) -> PolicySource:
    """The source for the config. Raises UserError for a `policy_from` that holds no such policies."""
    weight = config.teacher_weight if config.has_teacher else 0.0
    reward = Reward(weight, config.reward_ema, config.divide_by_std)
    return SOURCES[config.policy](config, clean_share=config.clean_share, reward=reward)


def transform(
    name: str, *, float_images: str | None = None, generator: torch.Generator | None = None, **settings: Any
) -> PublishedTransform:
    """A published augmentation (one of config.PER_IMAGE) as a transform, which is called like `augmentations.Augment`.

    settings: of config.py, `randaugment_n` and `randaugment_m`; `dataset="imagenet"` for AugMix at its severity there.
    Raises ValueError for an unknown name, UserError for a wrong setting.
    """
    if name not in PER_IMAGE:
        hint = did_you_mean(name, PER_IMAGE) or f"; there are {', '.join(PER_IMAGE)}"
        raise ValueError(f"{name!r} is no published augmentation{hint}")
    config = Config(**{"policy": name, "M": 1, "crop_padding": 0} | settings)
    with torch.device("cpu"):  # plans are made there, whatever the default device
        return PublishedTransform(build_policies(config), float_images=float_images, generator=generator)
