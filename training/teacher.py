"""A slow copy of the network that says which of the adversary's images can still be recognised.

Rewarded for the network's loss alone, an adversary may find operations that leave nothing to recognise. A teacher, the
moving average of the network, loses on those as much as the network does: taken off the reward, its loss makes them
worthless (Suzuki, "TeachAugment", CVPR 2022).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.distributed import World

YOUNG = 10  # steps: a young average keeps less of what it was, which are the network's random first weights


class Teacher:
    """The moving average of `model`'s weights and of its BatchNorm statistics, in evaluation mode, without gradient.

    rate: what a step keeps of it; after t steps at most (1 + t) / (10 + t). amp_dtype: see `World.wrap`.
    """

    def __init__(self, model: nn.Module, rate: float, world: World, amp_dtype: torch.dtype = torch.bfloat16):
        self.rate, self.steps = rate, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._called = world.on_all_devices(self.model, amp_dtype)

    def __call__(self, inputs_BCHW: Tensor) -> Tensor:
        return self._called(inputs_BCHW)

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Move towards the network as it is after a step."""
        self.steps += 1
        rate = min(self.rate, (1 + self.steps) / (YOUNG + self.steps))
        own, others = (list(one.state_dict(keep_vars=True).values()) for one in (self.model, model))
        pairs = list(zip(own, others, strict=True))
        averaged = [(ours, theirs.detach()) for ours, theirs in pairs if ours.is_floating_point()]
        get_ema_multi_avg_fn(rate)(*map(list, zip(*averaged, strict=True)), None)
        for ours, theirs in pairs:
            if not ours.is_floating_point():
                ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any], buffers: dict[str, Tensor]) -> None:
        """buffers: this process's own, in the place of those in `state`."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"] | buffers)

    def buffers(self) -> dict[str, Tensor]:
        """BatchNorm's statistics, which each process averages of its own, on the CPU."""
        return {name: buffer.cpu() for name, buffer in self.model.named_buffers()}
