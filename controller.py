"""The adversary: an LSTM that samples augmentation policies, trained by REINFORCE to raise the network's loss.

Adversarial AutoAugment (Zhang et al., ICLR 2020), https://arxiv.org/abs/1912.11188

    symbol  here            meaning (default)
    theta   Controller      parameters of the policy network
    w       models/         weights of the target network, which minimises the loss that theta maximises
    M       M               policies sampled per interval, an epoch (8)
    Q       Q               sub-policies of a policy (5); every image draws one of them
    K       K               operations of a sub-policy, applied in order (2)
    p_m     log_prob_M      probability of policy m: the product over its 2 * Q * K decisions
    L^_m    reward_M        mean of the target network's loss under policy m over the interval
    L~_m    advantage_M     L^_m normalised over the M policies
    beta    entropy_bonus   weight of the entropy in the objective (1e-5)

Shape suffixes: M, Q and K as above; D decisions of a policy; C choices of a decision. An operation is an index into the
controller's list of operations, which may be a subset of `augmentations.OPS`; a level is 0..levels-1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

PATHS = 16  # policies that the entropy is measured on; from one to the next it differs by some 0.03 % of its maximum
TOLERANCE = 1e-4  # above the floor, as a share of the maximal entropy
ATTEMPTS = 30  # to find a factor; two or three are usual


class Decisions(NamedTuple):
    """M sampled policies. op_MQK, level_MQK: int64. log_prob_M, entropy_M: float32, in nats, without gradient."""

    op_MQK: Tensor
    level_MQK: Tensor
    log_prob_M: Tensor
    entropy_M: Tensor


class Controller(nn.Module):
    """Embedding, one-layer LSTM, and a softmax over operations and over levels in turn; each choice is the next input.

    recurrence: "policy" carries the state through all decisions of a policy; "subpolicy" starts every sub-policy
    from the zero state and the start symbol, so that the Q sub-policies are independent draws of one distribution.

    logit_bound: c > 0 bounds all logits smoothly, c * tanh(logits / c), and so every probability; 0: unbounded.

    Runs on the CPU in float32: it is small, and its decisions are needed there to group images by operation.
    """

    def __init__(
        self,
        num_ops: int = 16,
        num_levels: int = 10,
        Q: int = 5,
        K: int = 2,
        *,
        recurrence: str = "policy",
        logit_bound: float = 0.0,
        embedding: int = 32,
        hidden: int = 100,
    ):
        super().__init__()
        if recurrence not in ("policy", "subpolicy"):
            raise ValueError(f"recurrence must be 'policy' or 'subpolicy', not {recurrence!r}")
        self.num_ops, self.num_levels, self.Q, self.K = num_ops, num_levels, Q, K
        self.recurrence, self.logit_bound = recurrence, logit_bound
        self.embedding = nn.Embedding(1 + num_ops + num_levels, embedding)  # the start symbol, operations, levels
        self.lstm = nn.LSTMCell(embedding, hidden)
        self.op_head = nn.Linear(hidden, num_ops)
        self.level_head = nn.Linear(hidden, num_levels)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        nn.init.zeros_(self.op_head.bias)
        nn.init.zeros_(self.level_head.bias)

    @torch.no_grad()
    def sample(self, M: int, generator: torch.Generator | None = None) -> Decisions:
        """Draw M policies (Algorithm 1: generate M policies with the probabilities p_1, ..., p_M)."""
        return self._decide(M, lambda _, probability_MC: probability_MC.multinomial(1, generator=generator).squeeze(1))

    @property
    def largest_entropy(self) -> float:
        """Of a policy, in nats: all decisions uniformly random."""
        return self.Q * self.K * (math.log(self.num_ops) + math.log(self.num_levels))

    @torch.no_grad()
    def hold_entropy(self, floor: float) -> float:
        """Keep a policy's entropy at no less than the share `floor` of its maximum, by scaling all logits.

        Where it is lower, the weights and biases of both heads are multiplied by the factor that just reaches it: all
        probabilities move towards the uniform ones and keep their order. With a floor of 1 the heads become 0.

        Returns the entropy's share of its maximum, by PATHS policies that are sampled with the same random numbers
        every time. With `logit_bound` it is the logits within tanh that are scaled.
        """
        uniform_PD = torch.rand(PATHS, 2 * self.Q * self.K, generator=torch.Generator().manual_seed(0))
        heads = [*self.op_head.parameters(), *self.level_head.parameters()]
        full = [parameter.clone() for parameter in heads]

        def scaled(square: float) -> float:
            for parameter, value in zip(heads, full, strict=True):
                parameter.copy_(value * math.sqrt(square))
            return self._decide(PATHS, _by_quantile(uniform_PD)).entropy_M.mean().item() / self.largest_entropy

        if (share := scaled(1.0)) >= floor:
            return share
        # What is lacking to the maximum grows about with the square of the factor: interpolate between two of those.
        (low, above), (high, below) = (0.0, 1.0), (1.0, share)
        for _ in range(ATTEMPTS if floor < 1 else 0):
            square = low + (high - low) * (above - floor - TOLERANCE / 2) / (above - below)
            if (share := scaled(square)) < floor:
                high, below = square, share
            else:
                low, above = square, share
                if share <= floor + TOLERANCE:
                    break
        return scaled(low)

    def log_prob(self, op_MQK: Tensor, level_MQK: Tensor) -> tuple[Tensor, Tensor]:
        """log p_m and the entropy for given decisions, (M,) each, with gradient.

        The entropy is the sum of the entropies of the softmaxes that the decisions were drawn from, in nats.
        """
        given_MD = torch.stack((op_MQK, level_MQK), dim=-1).flatten(1)
        decisions = self._decide(len(given_MD), lambda d, _: given_MD[:, d])
        return decisions.log_prob_M, decisions.entropy_M

    def _decide(self, M: int, choose: Callable[[int, Tensor], Tensor]) -> Decisions:
        """Run the LSTM over the 2 * Q * K decisions; choose(d, probability_MC) returns the d-th choice_M."""
        log_prob_M, entropy_M = torch.zeros(M), torch.zeros(M)
        chosen = []
        for d in range(2 * self.Q * self.K):
            if d == 0 or (self.recurrence == "subpolicy" and d % (2 * self.K) == 0):
                symbol_M, state = torch.zeros(M, dtype=torch.long), None
            is_op = d % 2 == 0
            state = self.lstm(self.embedding(symbol_M), state)
            logits_MC = (self.op_head if is_op else self.level_head)(state[0])
            if self.logit_bound:
                logits_MC = self.logit_bound * (logits_MC / self.logit_bound).tanh()
            log_p_MC = logits_MC.log_softmax(1)
            choice_M = choose(d, log_p_MC.exp())
            log_prob_M = log_prob_M + log_p_MC.gather(1, choice_M[:, None]).squeeze(1)  # p_m = prod_d p(decision d)
            entropy_M = entropy_M - (log_p_MC.exp() * log_p_MC).sum(1)
            chosen.append(choice_M)
            symbol_M = choice_M + (1 if is_op else 1 + self.num_ops)
        op_MQK, level_MQK = torch.stack(chosen, 1).view(M, self.Q, self.K, 2).unbind(-1)
        return Decisions(op_MQK, level_MQK, log_prob_M, entropy_M)


def _by_quantile(uniform_MD: Tensor) -> Callable[[int, Tensor], Tensor]:
    """For `Controller._decide`: the choice at a given quantile, in 0..1, of each decision's distribution."""

    def choose(d: int, probability_MC: Tensor) -> Tensor:
        passed_MC = probability_MC.cumsum(1)[:, :-1] <= uniform_MD[:, d, None]
        return passed_MC.sum(1)

    return choose


def advantage(reward_M: Tensor, *, divide_by_std: bool = True, eps: float = 1e-5) -> Tensor:
    """L~_m = (L^_m - mean) / std over the M policies, with the unbiased std; zero for a single policy.

    reward_M: the losses L^_m, or another reward. divide_by_std: False skips the division, so that small differences
    between policies have little effect.
    """
    if len(reward_M) < 2:
        return torch.zeros_like(reward_M)
    distance_M = reward_M - reward_M.mean()
    return distance_M / (reward_M.std() + eps) if divide_by_std else distance_M


def policy_loss(log_prob_M: Tensor, entropy_M: Tensor, advantage_M: Tensor, entropy_bonus: float) -> Tensor:
    """The loss whose descent lets theta *ascend* (1/M) sum_m L~_m grad log p_m, plus beta times the mean entropy.

    Policies under which the target network's loss is higher become more likely.
    """
    return -(advantage_M * log_prob_M).mean() - entropy_bonus * entropy_M.mean()


def reinforce(
    controller: Controller,
    optimizer: torch.optim.Optimizer,
    op_MQK: Tensor,
    level_MQK: Tensor,
    reward_M: Tensor,
    entropy_bonus: float,
    *,
    divide_by_std: bool = True,
) -> tuple[Tensor, Tensor]:
    """One step of theta for the M policies and the losses L^_m they caused (Algorithm 1, last line of an epoch).

    Recomputes the log-probabilities, so that only the decisions have to be kept between sampling and update. Returns
    (advantage_M, entropy_M), both without gradient. With M = 1 there is nothing to compare, and no step is taken.
    """
    advantage_M = advantage(reward_M, divide_by_std=divide_by_std)
    log_prob_M, entropy_M = controller.log_prob(op_MQK, level_MQK)
    if len(reward_M) > 1:
        optimizer.zero_grad(set_to_none=True)
        policy_loss(log_prob_M, entropy_M, advantage_M, entropy_bonus).backward()
        optimizer.step()
    return advantage_M, entropy_M.detach()
