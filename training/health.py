"""What can go wrong while a network learns from an adversary: numbers that are not finite, an adversary that collapses.

Shape suffixes: M policies; 2: the loss and the norm of the gradient, in this order.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.distributed import World

QUANTITIES = ("loss", "gradient")
# Draws of an interval below which one operation's share of them says nothing, and the share that is an alarm.
FEW_DRAWS, LARGE_SHARE = 20, 0.5


class NotFinite(FloatingPointError):
    """A number that is not finite: in which step of the epoch, from 0, in which processes, under which policies."""

    def __init__(self, what: str, step: int, ranks: list[int], policies: list[int]):
        super().__init__(f"the {what} is no longer finite")
        self.what, self.step, self.ranks, self.policies = what, step, ranks, policies


class FiniteMonitor:
    """Whether every loss and every gradient of an epoch has been finite, noted on the device: no step waits for it.

    Where a scaler leaves out the steps whose gradients are not finite, these are counted instead.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self, skipped: int = 0) -> None:
        """Forget what was noted, but for so many steps that have been left out."""
        self._first_2 = torch.full((2,), -1, device=self.device)  # the first step of the epoch where it was not finite
        self._bad_M: Tensor | None = None  # whether a policy's loss was not, in the first step where one was not
        self.skipped = torch.full((), skipped, device=self.device)
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None

    def observe(self, step: int, loss_M: Tensor, gradient_norm: Tensor, *, scaled: bool) -> None:
        """Note one step. loss_M: of each policy a number, such as a sum, that is finite if all its losses have been."""
        if scaled:
            self.skipped = self.skipped + ~gradient_norm.isfinite()
            gradient_norm = torch.zeros_like(gradient_norm)
        bad_M, before_2 = ~loss_M.isfinite(), self._first_2
        bad_2 = torch.stack((bad_M.any(), ~gradient_norm.isfinite()))
        self._first_2 = torch.where(bad_2 & (before_2 < 0), step, before_2)
        self._bad_M = bad_M if self._bad_M is None else torch.where(before_2[0] < 0, bad_M, self._bad_M)

    def look(self) -> bool:
        """Whether something is known to be wrong. On CUDA that may be seen some steps late, but costs no wait."""
        if self.device.type != "cuda":
            return bool((self._first_2 >= 0).any())
        if self._on_its_way is None:
            copy_2 = torch.empty(2, dtype=torch.long, pin_memory=True).copy_(self._first_2, non_blocking=True)
            self._on_its_way = copy_2, torch.cuda.current_stream(self.device).record_event()
        copy_2, arrived = self._on_its_way
        if not arrived.query():
            return False
        self._on_its_way = None
        return bool((copy_2 >= 0).any())

    def require_finite(self, world: World, state: Iterable[Tensor] = (), step: int = 0) -> None:
        """Raises NotFinite, in every process, if in any a number was not finite, or one of `state` after `step` is not.

        To be called by all processes; it waits.
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
    """Whether all floating-point values of these tensors are finite; the device is asked once."""
    finite = [tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not finite or bool(torch.stack(finite).all())


class Collapse(NamedTuple):
    """In how many intervals of a run the controller was seen to have collapsed, and after which step first."""

    intervals: int = 0
    first: int = -1

    def with_record(self, record: dict[str, Any]) -> "Collapse":
        if record["collapsed"] is None:
            return self
        return Collapse(self.intervals + 1, self.first if self.intervals else record["step"])


def collapse(entropy: float, largest: float, shares: dict[str, float], draws: int, threshold: float) -> str | None:
    """How a controller has collapsed, in words; None where it has not.

    entropy, largest: of a policy, and the largest there can be, in nats. threshold: the share of it that is an alarm.
    shares: of each operation in the `draws` operations of the interval's policies; more than half is an alarm, or, of
    three operations or fewer, twice an equal share.
    """
    if entropy < threshold * largest:
        return f"its entropy is {entropy:.2f} of {largest:.2f} nats"
    name, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    if draws >= FEW_DRAWS and share > max(LARGE_SHARE, 2 / max(1, len(shares))):
        return f"{name} is {share:.0%} of all operations drawn"
    return None
