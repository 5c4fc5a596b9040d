"""Policies sampled from a controller: one that learns in this run, or one that another run has trained.

Shape suffixes: M policies of Q sub-policies of K operations.
"""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, load_config
from controller import Controller, reinforce
from policies.sources import PolicySource, require_same_form
from utils import UserError, first_line, has_shape, keyed_seed, load_tensors, short_repr


class FrozenPolicies(PolicySource):
    """M policies per interval, sampled from another run's controller, which is not trained further."""

    def __init__(self, M: int, controller: Controller, ops: tuple[str, ...], levels: int, **options: Any):
        super().__init__(M, controller.Q, controller.K, ops, levels, **options)
        self.controller = controller

    def _sample(self, generator: torch.Generator, progress: Fraction) -> None:
        try:
            decisions = self.controller.sample(self.M, generator)
        except RuntimeError:  # the weights are so large that the softmax overflows
            raise FloatingPointError("the controller is no longer finite") from None
        self.op_MQK, self.level_MQK = self.rows[decisions.op_MQK], decisions.level_MQK

    def _choice_MQK(self) -> Tensor:
        """The operations in use, as indices into the controller's list."""
        return (self.op_MQK[..., None] == self.rows).int().argmax(-1)

    def _learn(self, reward_M: Tensor) -> tuple[Tensor, float]:
        with torch.no_grad():
            _, entropy_M = self.controller.log_prob(self._choice_MQK(), self.level_MQK)
        return super()._learn(reward_M)[0], entropy_M.mean().item()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"controller": self.controller.state_dict(), "form": self._form()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the controller that was saved. Raises ValueError if policy_from now holds one of another form."""
        require_same_form(self._form(), state["form"])
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])

    def _form(self) -> list[Any]:
        """All properties of the controller except its weights."""
        c = self.controller
        return [self.rows.tolist(), self.levels, c.Q, c.K, c.recurrence, c.logit_bound]


class ControllerPolicies(FrozenPolicies):
    """M policies sampled from the controller, which learns from the network's losses under them."""

    learns = True

    def __init__(
        self,
        M: int,
        controller: Controller,
        ops: tuple[str, ...],
        levels: int,
        *,
        lr: float,
        entropy_bonus: float,
        entropy_floors: tuple[float, float] = (0.0, 0.0),
        **options: Any,
    ):
        """entropy_floors: at the start and at the end of the run, as shares of the largest entropy."""
        super().__init__(M, controller, ops, levels, **options)
        self.entropy_floors, self.entropy_floor = entropy_floors, entropy_floors[0]
        self.optimizer = torch.optim.Adam(controller.parameters(), lr=lr)
        self.entropy_bonus = entropy_bonus

    def update(self, average: Callable[[Tensor], Tensor] = lambda loss_M: loss_M) -> dict[str, Any]:
        """As for all sources; where there is a floor, the record names it."""
        record = super().update(average)
        return record | ({"entropy_floor": self.entropy_floor} if any(self.entropy_floors) else {})

    def _sample(self, generator: torch.Generator, progress: Fraction) -> None:
        start, end = self.entropy_floors
        self.entropy_floor = start + (end - start) * float(progress)
        self._hold_entropy()
        super()._sample(generator, progress)

    def _hold_entropy(self) -> None:
        if self.entropy_floor:
            self.controller.hold_entropy(self.entropy_floor)

    def _learn(self, reward_M: Tensor) -> tuple[Tensor, float]:
        advantage_M, entropy_M = reinforce(
            self.controller,
            self.optimizer,
            self._choice_MQK(),
            self.level_MQK,
            reward_M,
            self.entropy_bonus,
            divide_by_std=self.reward.divide_by_std,
        )
        if not all(parameter.isfinite().all() for parameter in self.controller.parameters()):
            raise FloatingPointError("the controller is no longer finite")
        self._hold_entropy()
        return advantage_M, entropy_M.mean().item()

    def state_dict(self) -> dict[str, Any]:
        own = {"optimizer": self.optimizer.state_dict(), "entropy_floor": self.entropy_floor}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.entropy_floor = state["entropy_floor"]


def fresh_controller(config: Config) -> Controller:
    """A new controller for the config, whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed other devices too
        torch.default_generator.manual_seed(keyed_seed(config.seed, "controller"))
        return Controller(
            len(config.ops),
            config.levels,
            config.Q,
            config.K,
            recurrence=config.recurrence,
            logit_bound=config.logit_bound,
        )


def read_controller(path: Path) -> tuple[Controller, tuple[str, ...], int]:
    """A run's controller, its operations and its number of levels. path: the run's directory, or its model.pt.

    Raises UserError if there is none.
    """
    file = path / "model.pt" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file}: there is no such file to take a controller from; policy_from names a finished run")
    content = load_tensors(file)
    if not has_shape(content, {"config": dict, "controller": dict}):
        policy = content["config"].get("policy") if has_shape(content, {"config": dict}) else None
        what = f"was trained with policy: {short_repr(policy)}" if policy else "is no model.pt of main.py"
        raise UserError(f"{file}: holds no controller, it {what}; take a run with policy: controller")
    config = load_config(None, {field: (str(file), value) for field, value in content["config"].items()})
    controller = fresh_controller(config)
    try:
        controller.load_state_dict(content["controller"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its controller does not fit its settings ({first_line(error)})") from None
    if not all(parameter.isfinite().all() for parameter in controller.parameters()):
        raise UserError(f"{file}: its controller holds values that are not finite numbers")
    return controller.requires_grad_(False), config.ops, config.levels
