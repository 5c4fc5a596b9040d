"""Who decides what is applied to each image: M policies at a time, turned into a `Plan` per batch.

A policy is Q sub-policies of K operations, each with a level. The M policies hold for an interval (an epoch, or some
batches); every image of a batch is seen once per policy and draws one of that policy's sub-policies each time.

Every source has the same four calls, in this order: `resample` at the start of an interval, `plan` and `observe` per
step, `update` at the end of the interval.

Shape suffixes: M, Q, K as above; N distinct images of a batch; B = N * M copies, image-major: copy m of image n stands
at n * M + m, so that any run of whole images holds all their copies; O rows of OPS; L levels.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from augmentations import OPS, Plan, row_of, upload
from config import Config
from controller import Controller, advantage, reinforce
from utils import keyed_seed


class Tally(NamedTuple):
    """What an interval has seen so far in this process: the sum of the losses under each policy, over how many images.

    loss_sum_M: float64.
    """

    loss_sum_M: Tensor
    images: int


class PolicySource:
    """M policies without any operation: the control that has only crop, flip and Cutout, each copy its own.

    `ops` are names of operations in `augmentations.OPS`; op_MQK holds rows of OPS.
    """

    learns = False

    def __init__(self, M: int, Q: int = 5, K: int = 2, ops: tuple[str, ...] = (), levels: int = 10):
        self.M, self.Q, self.K, self.levels = M, Q, K, levels
        self.rows = torch.tensor([row_of(name) for name in ops], dtype=torch.long)
        self._magnitude_OL = torch.tensor(
            [[op.magnitude(level, levels) for level in range(levels)] for op in OPS], dtype=torch.float64
        )
        self._signed_O = torch.tensor([op.signed for op in OPS])
        self.op_MQK = torch.full((M, Q, K), -1)
        self.level_MQK = torch.zeros(M, Q, K, dtype=torch.long)
        self.tally = Tally(torch.zeros(M, dtype=torch.float64), 0)

    def resample(self, generator: torch.Generator) -> None:
        """Begin an interval: choose the M policies and forget the losses of the last ones."""
        self._sample(generator)
        self.tally = Tally(torch.zeros(self.M, dtype=torch.float64), 0)

    def plan(self, N: int, generator: torch.Generator, groups: int = 1) -> Plan:
        """Draw what happens to each of the N * M copies: sub-policy, sign, partner and centre of each operation.

        SamplePairing's partner is another image of the batch, in the copy made for the same policy; of the same one
        of `groups` equal parts of the batch, where an image cannot see the others.
        """
        M, Q, K = self.M, self.Q, self.K
        subpolicy_NM = torch.randint(Q, (N, M), generator=generator)
        op_BK = self.op_MQK[torch.arange(M), subpolicy_NM].view(N * M, K)
        level_BK = self.level_MQK[torch.arange(M), subpolicy_NM].view(N * M, K)
        coin_BK = torch.randint(2, (N * M, K), generator=generator).bool()
        magnitude_BK = self._magnitude_OL[op_BK, level_BK]
        magnitude_BK = torch.where(coin_BK & self._signed_O[op_BK], -magnitude_BK, magnitude_BK)
        size = N // groups
        step_NMK = torch.randint(1, max(2, size), (N, M, K), generator=generator)
        n = torch.arange(N)[:, None, None]
        partner_NMK = (n - n % size + (n + step_NMK) % size) * M + torch.arange(M)[:, None]
        centre_BK2 = torch.rand(N * M, K, 2, dtype=torch.float64, generator=generator)
        return Plan(op_BK, magnitude_BK, partner_NMK.view(N * M, K), centre_BK2)

    def observe(self, loss_NM: Tensor) -> None:
        """Add losses to the interval's mean loss of each policy, L^_m; stays on the losses' device."""
        loss_sum_M = upload(self.tally.loss_sum_M, loss_NM.device) + loss_NM.detach().double().sum(0)
        self.tally = Tally(loss_sum_M, self.tally.images + len(loss_NM))

    def update(self, average: Callable[[Tensor], Tensor] = lambda loss_M: loss_M) -> dict[str, Any]:
        """End an interval: learn from the losses. Returns the interval's record.

        average: makes one mean of the means of several processes, each of which saw as many images.

        The record holds the policies by name, their mean losses, advantages, mean entropy (nats), the losses' spread
        (unbiased standard deviation), and the shares of operations and levels. Raises FloatingPointError, before
        anything is learned, if a loss is not finite, and afterwards if the controller is not.
        """
        loss_M = average(self.tally.loss_sum_M / max(1, self.tally.images)).cpu()
        if not loss_M.isfinite().all():
            raise FloatingPointError("the loss is no longer finite")
        advantage_M, entropy = self._learn(loss_M)
        return {
            "policies": self.by_name(),
            "losses": loss_M.tolist(),
            "advantages": advantage_M.tolist(),
            "entropy": entropy,
            "loss_spread": loss_M.std().item() if self.M > 1 else 0.0,
            "shares": self.shares(),
        }

    def by_name(self) -> list[list[list[tuple[str, int]]]]:
        """The M policies as lists of sub-policies, each a list of (operation, level)."""
        return [
            [
                [(OPS[op].name, level) for op, level in zip(ops, levels, strict=True) if op >= 0]
                for ops, levels in zip(ops_QK, levels_QK, strict=True)
            ]
            for ops_QK, levels_QK in zip(self.op_MQK.tolist(), self.level_MQK.tolist(), strict=True)
        ]

    def in_words(self) -> list[str]:
        """The M policies as texts with magnitudes, such as "Rotate ±6.67 then Invert or ..."."""

        def operation(name: str, level: int) -> str:
            op = OPS[row_of(name)]
            sign = "±" if op.signed else ""
            return name if op.low is None else f"{name} {sign}{op.magnitude(level, self.levels):.3g}"

        def words(policy: list[list[tuple[str, int]]]) -> str:
            subpolicies = (" then ".join(operation(*choice) for choice in subpolicy) for subpolicy in policy)
            return " or ".join(filter(None, subpolicies)) or "as it is"

        return [words(policy) for policy in self.by_name()]

    def shares(self) -> dict[str, dict[Any, float]]:
        """Share of each operation, and of each level, in the M policies in use; empty where there are none."""
        if not len(self.rows):
            return {}
        op_shares = (self.op_MQK.flatten()[:, None] == self.rows).double().mean(0).tolist()
        level_shares = (self.level_MQK.flatten()[:, None] == torch.arange(self.levels)).double().mean(0).tolist()
        names = [OPS[row].name for row in self.rows.tolist()]
        return {"operations": dict(zip(names, op_shares, strict=True)), "levels": dict(enumerate(level_shares))}

    @property
    def largest_entropy(self) -> float:
        """Entropy of a policy, in nats, whose decisions are all uniformly random."""
        return self.Q * self.K * (math.log(len(self.rows)) + math.log(self.levels)) if len(self.rows) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The policies in use: with `tally`, all that an interval needs to go on where it was left."""
        return {"op_MQK": self.op_MQK, "level_MQK": self.level_MQK}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.op_MQK, self.level_MQK = state["op_MQK"], state["level_MQK"]

    def _sample(self, generator: torch.Generator) -> None:
        """Choose the M policies of an interval."""

    def _learn(self, loss_M: Tensor) -> tuple[Tensor, float]:
        """Take the M losses into account; returns (advantage_M, mean entropy of a policy in nats)."""
        return advantage(loss_M), 0.0


class RandomPolicies(PolicySource):
    """M uniformly random policies per interval: what a learned policy has to beat."""

    def _sample(self, generator: torch.Generator) -> None:
        shape = (self.M, self.Q, self.K)
        self.op_MQK = self.rows[torch.randint(len(self.rows), shape, generator=generator)]
        self.level_MQK = torch.randint(self.levels, shape, generator=generator)

    def _learn(self, loss_M: Tensor) -> tuple[Tensor, float]:
        return advantage(loss_M), self.largest_entropy


class ControllerPolicies(PolicySource):
    """M policies sampled from the controller, which learns from the losses they cause.

    The controller's weights start from `seed`, whatever else has been drawn before.
    """

    learns = True

    def __init__(
        self,
        M: int,
        Q: int,
        K: int,
        ops: tuple[str, ...],
        levels: int,
        *,
        recurrence: str,
        lr: float,
        entropy_bonus: float,
        seed: int,
    ):
        super().__init__(M, Q, K, ops, levels)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach other devices too
            self.controller = Controller(len(ops), levels, Q, K, recurrence=recurrence)
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=lr)
        self.entropy_bonus = entropy_bonus

    def _sample(self, generator: torch.Generator) -> None:
        try:
            decisions = self.controller.sample(self.M, generator)
        except RuntimeError:  # of weights so large that what comes of them is no probability
            raise FloatingPointError("the controller is no longer finite") from None
        self.op_MQK, self.level_MQK = self.rows[decisions.op_MQK], decisions.level_MQK

    def _learn(self, loss_M: Tensor) -> tuple[Tensor, float]:
        choice_MQK = (self.op_MQK[..., None] == self.rows).int().argmax(-1)
        advantage_M, entropy_M = reinforce(
            self.controller, self.optimizer, choice_MQK, self.level_MQK, loss_M, self.entropy_bonus
        )
        if not all(parameter.isfinite().all() for parameter in self.controller.parameters()):
            raise FloatingPointError("the controller is no longer finite")
        return advantage_M, entropy_M.mean().item()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_policies(config: Config) -> PolicySource:
    """The source that the config asks for."""
    shape = (config.M, config.Q, config.K)
    match config.policy:
        case "controller":
            return ControllerPolicies(
                *shape,
                config.ops,
                config.levels,
                recurrence=config.recurrence,
                lr=config.controller_lr,
                entropy_bonus=config.entropy_bonus,
                seed=keyed_seed(config.seed, "controller"),
            )
        case "random":
            return RandomPolicies(*shape, config.ops, config.levels)
        case "none":
            return PolicySource(*shape)
    raise ValueError(f"unknown source of policies {config.policy!r}")
