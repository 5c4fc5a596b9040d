"""Checks of a training run: numbers that are not finite, and a controller that has collapsed.

Shape suffixes: M policies; 2: the loss and the norm of the gradient, in this order.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.distributed import World

QUANTITIES = ("loss", "gradient")
FEW_DRAWS = 20  # with fewer operations drawn in an interval, the share of one of them means nothing
LARGE_SHARE = 0.5  # of one operation, above which the controller counts as collapsed


class NotFinite(FloatingPointError):
    """A number that is not finite, with the step of the epoch (from 0), the ranks and the policies concerned."""

    def __init__(self, what: str, step: int, ranks: list[int], policies: list[int]):
        super().__init__(f"the {what} is no longer finite")
        self.what, self.step, self.ranks, self.policies = what, step, ranks, policies


class FiniteMonitor:
    """Checks every loss and gradient of an epoch on the device, without waiting for it in any step.

    Steps that a gradient scaler skips because their gradients are not finite are counted instead.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self, skipped: int = 0) -> None:
        """Start again, with this number of skipped steps."""
        self._first_2 = torch.full((2,), -1, device=self.device)  # the first step that was not finite, or -1
        self._bad_M: Tensor | None = None  # of the first step with a loss that was not finite
        self.skipped = torch.full((), skipped, device=self.device)
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def observe(self, step: int, loss_M: Tensor, gradient_norm: Tensor, *, scaled: bool) -> None:
        """Note one step. loss_M: one number per policy, such as a sum, that is finite if all its losses are."""
        if scaled:
            self.skipped = self.skipped + ~gradient_norm.isfinite()
            gradient_norm = torch.zeros_like(gradient_norm)
        bad_M, before_2 = ~loss_M.isfinite(), self._first_2
        bad_2 = torch.stack((bad_M.any(), ~gradient_norm.isfinite()))
        self._first_2 = torch.where(bad_2 & (before_2 < 0), step, before_2)
        self._bad_M = bad_M if self._bad_M is None else torch.where(before_2[0] < 0, bad_M, self._bad_M)

    def look(self) -> bool:
        """Whether a number is known not to be finite. On CUDA this may be some steps late, but does not wait."""
        if self.device.type != "cuda":
            return bool((self._first_2 >= 0).any())
        if self._pending is None:
            copy_2 = torch.empty(2, dtype=torch.long, pin_memory=True).copy_(self._first_2, non_blocking=True)
            self._pending = copy_2, torch.cuda.current_stream(self.device).record_event()
        copy_2, arrived = self._pending
        if not arrived.query():
            return False
        self._pending = None
        return bool((copy_2 >= 0).any())

    def require_finite(self, world: World, state: Iterable[Tensor] = (), step: int = 0) -> None:
        """Raises NotFinite, in every process, if any number in any process, or `state` after `step`, is not finite.

        To be called by all processes; waits for the device.
        """
        first_2, bad_M = self._first_2.tolist(), [] if self._bad_M is None else self._bad_M.tolist()
        noted = world.gather((first_2, [m for m, bad in enumerate(bad_M) if bad], all_finite(state)))
        found = ((step, index, rank) for rank, (steps, _, _) in enumerate(noted) for index, step in enumerate(steps))
        if bad := sorted(one for one in found if one[0] >= 0):
            first, index, _ = bad[0]
            ranks = [rank for one, of, rank in bad if (one, of) == (first, index)]
            policies = {policy for rank in ranks for policy in noted[rank][1]} if QUANTITIES[index] == "loss" else set()
            raise NotFinite(QUANTITIES[index], first, ranks, sorted(policies))
        if broken := [rank for rank, (_, _, whole) in enumerate(noted) if not whole]:
            raise NotFinite("network", step, broken, [])


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all floating-point values of these tensors are finite; waits for the device once."""
    finite = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not finite or bool(torch.stack(finite).all())


class CollapseCount(NamedTuple):
    """The number of intervals of a run in which the controller had collapsed, and the step after the first of them."""

    intervals: int = 0
    first: int = -1

    def with_record(self, record: dict[str, Any]) -> "CollapseCount":
        if record["collapsed"] is None:
            return self
        return CollapseCount(self.intervals + 1, self.first if self.intervals else record["step"])


def collapse_message(
    entropy: float, largest: float, shares: dict[str, float], draws: int, threshold: float
) -> str | None:
    """How the controller has collapsed; None if it has not.

    entropy, largest: of a policy, and its maximum, in nats; collapsed below the share `threshold` of the maximum.
    shares: of each operation among the `draws` operations of the interval's policies; collapsed if one has more than
    half of them or, with three operations or fewer, more than twice an equal share.
    """
    if entropy < threshold * largest:
        return f"its entropy is {entropy:.2f} of {largest:.2f} nats"
    name, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if draws >= FEW_DRAWS and share > max(LARGE_SHARE, 2 / max(1, len(shares))):
        return f"{name} is {share:.0%} of all operations drawn"
    return None
