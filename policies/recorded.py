"""Policies from a file, or from the record of another run.

A file of policies is YAML or JSON: a list of policies, or a mapping that holds it under "policies" and, unless it is
10, the number of "levels". A policy is a list of sub-policies, each a list of [operation, level] or of [operation,
level, probability]. A line of a run's policies.jsonl is such a mapping; the whole file is a sequence of them.

    policies:
      - [[[Rotate, 3], [Invert, 0]], [[Solarize, 2]]]     # two sub-policies, of which every image draws one
      - [[[ShearX, 9]], [[Cutout, 4.5], [Equalize, 0, 0.8]]]

Shape suffixes: R recorded intervals with P policies each, of Q sub-policies of K operations.
"""

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from augmentations import OPS, read_operation
from policies.sources import PolicySource, require_same_form
from utils import UserError, first_line, printable, read_text, short_repr

LONGEST_FILE = 2**26  # bytes of policies.jsonl: 200 intervals of the paper's shape are half a million
LONGEST_YAML = 2**20  # PyYAML takes a minute for a few of these
MOST_OPERATIONS = 10**6  # of all policies of a file


class RecordedPolicies(PolicySource):
    """Policies from a file: for each interval, those recorded at the same share of their run.

    recorded: P policies of each of R intervals. With P = M, all are used in their order; otherwise M of the P are drawn
    for each interval, all equally often or some once more.
    """

    def __init__(self, M: int, recorded: "Recorded", **options: Any):
        _, _, Q, K = recorded.op_RPQK.shape
        ops = tuple(OPS[row].name for row in recorded.op_RPQK.unique().tolist() if row >= 0)
        super().__init__(M, Q, K, ops, recorded.levels, **options)
        self.recorded = recorded

    def _sample(self, generator: torch.Generator, progress: Fraction) -> None:
        op_RPQK, level_RPQK, _, probability_RPQK = self.recorded
        R, P = op_RPQK.shape[:2]
        r = min(R - 1, math.floor(progress * R))
        rounds = [torch.randperm(P, generator=generator) for _ in range(-(-self.M // P))]
        chosen_M = torch.arange(P) if P == self.M else torch.cat(rounds)[: self.M]
        self.op_MQK, self.level_MQK = op_RPQK[r, chosen_M], level_RPQK[r, chosen_M]
        self.probability_MQK = None if probability_RPQK is None else probability_RPQK[r, chosen_M]

    def state_dict(self) -> dict[str, Any]:
        op_RPQK, level_RPQK, levels, probability_RPQK = self.recorded
        own = {"recorded": [op_RPQK, level_RPQK], "levels": levels}
        return super().state_dict() | own | ({} if probability_RPQK is None else {"probability_RPQK": probability_RPQK})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the policies read when the run started. Raises ValueError if policy_from has another form now."""
        require_same_form(
            (self.levels, *self.recorded.op_RPQK.shape[2:]), (state["levels"], *state["recorded"][0].shape[2:])
        )
        super().load_state_dict(state)
        self.recorded = Recorded(*state["recorded"], state["levels"], state.get("probability_RPQK"))


class Recorded(NamedTuple):
    """P policies of each of R intervals, (R, P, Q, K): rows of OPS, -1 for none, and levels.

    level_RPQK: int64 or, where one is not a whole number, float64. probability_RPQK: None where all operations are
    always applied.
    """

    op_RPQK: Tensor
    level_RPQK: Tensor
    levels: int
    probability_RPQK: Tensor | None = None


def read_policies(path: Path) -> Recorded:
    """The policies of a file, or a run's record of policies (its directory, or its policies.jsonl).

    Raises UserError with the file and the place for anything that does not have the format above.
    """
    file = path / "policies.jsonl" if path.is_dir() else path
    return recorded(_read_intervals(file), file)


def recorded(intervals: Sequence[Mapping[str, Any]], file: Path) -> Recorded:
    """The policies of intervals that were read from `file`, checked. Raises UserError as `read_policies` does."""
    levels, read, operations = intervals[0].get("levels", 10), [], 0
    whole = type(levels) is int and 2 <= levels <= 1000
    _require(whole, f"{file}: levels", levels, "is not a whole number between 2 and 1000")
    for interval in intervals:
        if interval.get("levels", 10) != levels:
            raise UserError(f"{file}: its lines differ in the number of levels; they cannot be of one run")
        policies = interval.get("policies")
        _require(isinstance(policies, list) and policies, file, policies, "is no list of policies")
        read.append([])
        for number, policy in enumerate(policies, start=1):
            where = f"{file}: policy {number}"
            _require(isinstance(policy, list) and policy, where, policy, "is no list of sub-policies")
            operations += sum(1 + len(sub) if isinstance(sub, list) else 1 for sub in policy)
            if operations > MOST_OPERATIONS:  # before they are read: YAML aliases can stand for any number
                raise UserError(f"{file}: holds more than {MOST_OPERATIONS:,} operations; use fewer policies")
            read[-1].append(
                [_read_subpolicy(sub, f"{where}, sub-policy {q + 1}", levels) for q, sub in enumerate(policy)]
            )
            P, Q = len(read[0]), len(read[0][0])
            _require(len(policy) == Q, where, len(policy), f"sub-policies, where the first policy has {Q}")
        _require(len(policies) == P, file, len(policies), f"policies on a line, where the first line has {P}")
    return _padded(read, levels, file)


def _read_subpolicy(subpolicy: Any, where: str, levels: int) -> list[tuple[int, float, float]]:
    """Rows of OPS, levels and probabilities."""
    _require(isinstance(subpolicy, list), where, subpolicy, "is no list of [operation, level]")
    try:
        return [read_operation(entry, levels) for entry in subpolicy]
    except ValueError as error:
        raise UserError(f"{where}: {printable(str(error))}") from None


def _padded(read: list[list[list[list[tuple[int, float, float]]]]], levels: int, file: Path) -> Recorded:
    """Sub-policies padded with no operation to the length of the longest."""
    lengths = [len(sub) for policies in read for policy in policies for sub in policy]
    K = max(1, *lengths)
    if len(lengths) * K > 2 * MOST_OPERATIONS:
        raise UserError(f"{file}: its sub-policies are of too different lengths, up to {K:,} operations")
    padded = [[[[*sub, *[(-1, 0, 1)] * (K - len(sub))] for sub in policy] for policy in policies] for policies in read]
    op_RPQK, level_RPQK, probability_RPQK = torch.tensor(padded, dtype=torch.float64).unbind(-1)
    whole, always = (level_RPQK == level_RPQK.floor()).all(), (probability_RPQK == 1).all()
    levels_RPQK = level_RPQK.long() if whole else level_RPQK
    return Recorded(op_RPQK.long(), levels_RPQK, levels, None if always else probability_RPQK)


def _require(ok: Any, where: str | Path, value: Any, problem: str) -> None:
    if not ok:
        raise UserError(f"{where}: {short_repr(value)} {problem}")


def _read_intervals(file: Path) -> list[dict[str, Any]]:
    """The content of a file for each interval, not checked yet."""
    try:
        text = read_text(file, LONGEST_FILE if file.suffix in (".jsonl", ".json") else LONGEST_YAML)
        if file.suffix == ".jsonl":
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content = [json.loads(text) if file.suffix == ".json" else yaml.load(text, yaml.SafeLoader)]
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file of policies; policy_from names one, or a run") from None
    except Exception as error:  # PyYAML's constructors raise more than YAMLError
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {printable(str(problem))}" if mark and problem else first_line(error)
        raise UserError(f"{file}: cannot be read as a file of policies ({reason})") from None
    intervals = [{"policies": one} if isinstance(one, list) else one for one in content]
    if not intervals or not all(isinstance(one, dict) for one in intervals):
        raise UserError(f"{file}: holds no policies; docs/policies.md shows the format")
    return intervals
