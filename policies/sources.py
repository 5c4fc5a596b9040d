"""The base of all sources of policies, and random policies: M policies at a time, turned into a `Plan` per batch.

A policy is Q sub-policies of K operations, each with a level. The M policies are in use for an interval (an epoch, or
some steps); every image of a batch is seen once per policy and draws one of that policy's sub-policies each time.

Every source has the same four calls: `resample` at the start of an interval, `plan` and `observe` in every step,
`update` at the end of the interval.

Shape suffixes: M, Q, K as above; N distinct images of a batch; B = N * M copies, image-major: copy m of image n is
number n * M + m, so that a slice of whole images holds all their copies; O rows of OPS; L levels.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from augmentations import OPS, Plan, row_of, upload
from controller import advantage

START = Fraction(0)  # of a run


class LossSums(NamedTuple):
    """Sums of the losses under each policy over the interval's images in this process.

    loss_sum_M, teacher_sum_M: of the network and of its teacher, float64; the latter 0 without a teacher.
    reward_sum_M: of what the network contributes to the reward: its loss, or another function of its answer.
    images: number of images summed; with `Reward.ema`, the sum of their weights.
    """

    loss_sum_M: Tensor
    teacher_sum_M: Tensor
    reward_sum_M: Tensor
    images: float

    @classmethod
    def empty(cls, M: int) -> "LossSums":
        return cls(*torch.zeros(3, M, dtype=torch.float64), 0.0)


class Reward(NamedTuple):
    """How the adversary is rewarded; the defaults are the paper's.

    teacher_weight: lambda; the reward is the network's loss less lambda times the teacher's.
    ema: rate of a moving average over the interval's steps for L^_m; 0: the plain mean over the interval.
    divide_by_std: the advantage is measured in standard deviations over the M policies.
    """

    teacher_weight: float = 0.0
    ema: float = 0.0
    divide_by_std: bool = True


PAPERS_REWARD = Reward()


def require_same_form(now: Sequence[Any], saved: Sequence[Any]) -> None:
    if list(now) != list(saved):
        raise ValueError("policy_from holds policies of another form than when the run started")


class PolicySource:
    """M policies without operations: the control with crop, flip and Cutout only, and the base of all sources.

    ops: names of operations in `augmentations.OPS`; op_MQK holds rows of OPS. clean_share: probability that a copy is
    not given its policy's operations.
    """

    learns = False
    views = 1  # augmented versions that a copy is mixed from

    def __init__(
        self,
        M: int,
        Q: int = 5,
        K: int = 2,
        ops: tuple[str, ...] = (),
        levels: int = 10,
        *,
        clean_share: float = 0.0,
        reward: Reward = PAPERS_REWARD,
    ):
        self.M, self.Q, self.K, self.levels = M, Q, K, levels
        self.clean_share, self.reward = clean_share, reward
        self.rows = torch.tensor([row_of(name) for name in ops], dtype=torch.long)
        ranges = [(op.low, op.high) if op.low is not None else (0.0, 0.0) for op in OPS]
        self._low_O, self._high_O = torch.tensor(ranges, dtype=torch.float64).T
        self._signed_O = torch.tensor([op.signed for op in OPS])
        self.op_MQK = torch.full((M, Q, K), -1)
        self.level_MQK = torch.zeros(M, Q, K, dtype=torch.long)
        self.probability_MQK: Tensor | None = None  # of each operation; None: all are applied
        self.loss_sums = LossSums.empty(M)

    def resample(self, generator: torch.Generator, progress: Fraction = START) -> None:
        """Start an interval: choose the M policies and reset the losses.

        progress: share of the run's steps that are done, in 0..1.
        """
        self._sample(generator, progress)
        self.loss_sums = LossSums.empty(self.M)

    def plan(self, N: int, size: tuple[int, int], generator: torch.Generator, groups: int = 1) -> Plan:
        """Draw the operations on each of the N * M copies: a plan of (N * M * views, K).

        size: (H, W) of the images. SamplePairing's partner is the same policy's copy of another image, from the same
        of `groups` equal parts of the batch.
        """
        plan = self._plan(N, size, generator, groups)
        if self.clean_share:
            clean_B = torch.rand(N * self.M, generator=generator) < self.clean_share
            plan = plan._replace(op_BK=plan.op_BK.masked_fill(clean_B[:, None], -1))
        return plan

    def weights(self, N: int, generator: torch.Generator) -> Tensor | None:
        """Weights of the views that each copy is mixed from, float32 (N * M, views); None if there is one view."""
        return None

    def observe(self, loss_NM: Tensor, teacher_loss_NM: Tensor | None = None, reward_NM: Tensor | None = None) -> None:
        """Add a step's losses to the sums of the interval; they stay on the losses' device.

        reward_NM: the network's part of the reward, where that is not its loss.
        """
        added = loss_NM, teacher_loss_NM, loss_NM if reward_NM is None else reward_NM
        keep = self.reward.ema or 1.0
        before, sums = self.loss_sums, []
        for sum_M, added_NM in zip(before[:3], added, strict=True):
            sum_M = upload(sum_M, loss_NM.device) * keep
            sums.append(sum_M if added_NM is None else sum_M + added_NM.detach().double().sum(0))
        self.loss_sums = LossSums(*sums, before.images * keep + len(loss_NM))

    def update(self, average: Callable[[Tensor], Tensor] = lambda loss_M: loss_M) -> dict[str, Any]:
        """End an interval: learn from the losses. Returns the interval's record.

        average: the mean over processes, each of which saw the same number of images.

        The record holds the policies by name, the number of levels, the policies' mean losses (and the teacher's, with
        a teacher), advantages, the mean entropy (nats), the spread of the losses (unbiased standard deviation), and the
        shares of operations and levels. Raises FloatingPointError if a loss is not finite, before the controller is
        changed, or if the controller is not finite after its step.
        """
        sums_3M = torch.stack(self.loss_sums[:3])
        loss_M, teacher_loss_M, reward_M = average(sums_3M / max(1.0, self.loss_sums.images)).cpu()
        reward_M = reward_M - self.reward.teacher_weight * teacher_loss_M
        if not (loss_M.isfinite() & reward_M.isfinite()).all():
            raise FloatingPointError("the loss is no longer finite")
        advantage_M, entropy = self._learn(reward_M)
        return {
            "policies": self.by_name(),
            "levels": self.levels,
            "losses": loss_M.tolist(),
            **({"teacher_losses": teacher_loss_M.tolist()} if self.reward.teacher_weight else {}),
            "advantages": advantage_M.tolist(),
            "entropy": entropy,
            "loss_spread": loss_M.std().item() if self.M > 1 else 0.0,
            "shares": self.shares(),
        }

    def by_name(self) -> list[list[list[tuple]]]:
        """The M policies as lists of sub-policies, each a list of (operation, level[, probability])."""
        probability_MQK = torch.ones(self.op_MQK.shape) if self.probability_MQK is None else self.probability_MQK
        return [
            [
                [(OPS[op].name, level, *([p] if p < 1 else [])) for op, level, p in zip(*sub, strict=True) if op >= 0]
                for sub in zip(*policy, strict=True)
            ]
            for policy in zip(self.op_MQK.tolist(), self.level_MQK.tolist(), probability_MQK.tolist(), strict=True)
        ]

    def descriptions(self) -> list[str]:
        """The M policies as texts with magnitudes, such as "Rotate ±6.67 then Invert or ..."."""

        def operation(name: str, level: float, probability: float = 1.0) -> str:
            op = OPS[row_of(name)]
            strength = "" if op.low is None else f" {'±' if op.signed else ''}{op.magnitude(level, self.levels):.3g}"
            return f"{name}{strength}{f' ({probability:.0%})' if probability < 1 else ''}"

        def one(policy: list[list[tuple]]) -> str:
            subpolicies = (" then ".join(operation(*choice) for choice in subpolicy) for subpolicy in policy)
            return " or ".join(filter(None, subpolicies)) or "as it is"

        return [one(policy) for policy in self.by_name()]

    def shares(self) -> dict[str, dict[Any, float]]:
        """Share of each operation, and of each level, in the M policies in use; empty for a source without policies."""
        if not len(self.rows):
            return {}
        op_shares = (self.op_MQK.flatten()[:, None] == self.rows).double().mean(0).tolist()
        level_shares = (
            (self.level_MQK.round().flatten()[:, None] == torch.arange(self.levels)).double().mean(0).tolist()
        )
        names = [OPS[row].name for row in self.rows.tolist()]
        return {"operations": dict(zip(names, op_shares, strict=True)), "levels": dict(enumerate(level_shares))}

    @property
    def largest_entropy(self) -> float:
        """Entropy of a policy, in nats, whose decisions are all uniformly random."""
        return self.Q * self.K * (math.log(len(self.rows)) + math.log(self.levels)) if len(self.rows) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The policies in use: with `loss_sums`, all that is needed to continue an interval."""
        state = {"op_MQK": self.op_MQK, "level_MQK": self.level_MQK}
        return state if self.probability_MQK is None else state | {"probability_MQK": self.probability_MQK}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.op_MQK, self.level_MQK = state["op_MQK"], state["level_MQK"]
        self.probability_MQK = state.get("probability_MQK")

    def _sample(self, generator: torch.Generator, progress: Fraction) -> None:
        """Choose the M policies of an interval."""

    def _plan(self, N: int, size: tuple[int, int], generator: torch.Generator, groups: int) -> Plan:
        """Draw each copy's sub-policy, and the sign, partner and centre of each operation."""
        M, Q, K = self.M, self.Q, self.K
        subpolicy_NM = torch.randint(Q, (N, M), generator=generator)
        op_BK = self.op_MQK[torch.arange(M), subpolicy_NM].view(N * M, K)
        level_BK = self.level_MQK[torch.arange(M), subpolicy_NM].view(N * M, K)
        coin_BK = torch.randint(2, (N * M, K), generator=generator).bool()
        low_BK, high_BK = self._low_O[op_BK], self._high_O[op_BK]
        magnitude_BK = low_BK + level_BK.double() / (self.levels - 1) * (high_BK - low_BK)  # as in Op.magnitude
        magnitude_BK = torch.where(coin_BK & self._signed_O[op_BK], -magnitude_BK, magnitude_BK)
        part = N // groups
        step_NMK = torch.randint(1, max(2, part), (N, M, K), generator=generator)
        n = torch.arange(N)[:, None, None]
        partner_NMK = (n - n % part + (n + step_NMK) % part) * M + torch.arange(M)[:, None]
        centre_BK2 = torch.rand(N * M, K, 2, dtype=torch.float64, generator=generator)
        if self.probability_MQK is not None:
            probability_BK = self.probability_MQK[torch.arange(M), subpolicy_NM].view(N * M, K)
            applied_BK = torch.rand(N * M, K, generator=generator) < probability_BK
            op_BK = torch.where(applied_BK, op_BK, -1)
        return Plan(op_BK, magnitude_BK, partner_NMK.view(N * M, K), centre_BK2)

    def _learn(self, reward_M: Tensor) -> tuple[Tensor, float]:
        """Learn from the M rewards; returns (advantage_M, mean entropy of a policy in nats)."""
        return advantage(reward_M, divide_by_std=self.reward.divide_by_std), 0.0


class RandomPolicies(PolicySource):
    """M uniformly random policies per interval: the control that a learned policy has to beat."""

    def _sample(self, generator: torch.Generator, progress: Fraction) -> None:
        shape = (self.M, self.Q, self.K)
        self.op_MQK = self.rows[torch.randint(len(self.rows), shape, generator=generator)]
        self.level_MQK = torch.randint(self.levels, shape, generator=generator)

    def _learn(self, reward_M: Tensor) -> tuple[Tensor, float]:
        return super()._learn(reward_M)[0], self.largest_entropy
