"""How far a controller gets in so many updates, by how clearly its reward speaks; no network is trained.

    python benchmarks/controller.py [--updates 400] [--plot docs/collapse_by_noise.png]

The reward of a policy is the share of one operation in it plus its share at the highest level, and Gaussian noise of
the given standard deviations. Without noise it varies between random policies with a standard deviation of 0.09. A
controller of the paper's settings first stays where it is, nearly uniform, for as long as the noise hides the reward,
and then collapses within some dozens of updates: its LSTM's inputs, state and biases all move the same way. There is
hardly a stable state in between, unless a floor holds its entropy.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from measuring import count, parse, parser, publish

from analysis.figures import line_style, new_figure
from config import PAPER_OPS, Config
from evaluation.text_table import Table
from policies import build_policies
from training.exit import exit_with_status
from utils import keyed_generator

REWARDED = "Rotate"
NOISES = (0.0, 0.1, 0.3)
HELD = 0.9  # the floor that is compared
PLATEAU, COLLAPSED = 0.99, 0.25  # shares of the maximal entropy


def main() -> None:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--updates", type=count, default=400, help="of the controller (default: %(default)s)")
    add("--seeds", type=count, default=2, help="controllers of each kind (default: %(default)s)")
    add("--M", type=count, default=8, help="policies of an update (default: %(default)s)")
    add("--plot", type=Path, help="PNG file of the curves; needs matplotlib")
    args = parse(arguments)
    cases = {f"noise {noise}": (noise, 0.0) for noise in NOISES}
    cases |= {f"noise {noise}, held at {HELD:.0%}": (noise, HELD) for noise in (NOISES[0], NOISES[-1])}
    curves = {
        name: [entropies(noise, floor, args.updates, args.M, seed) for seed in range(args.seeds)]
        for name, (noise, floor) in cases.items()
    }
    header = ("reward", f"left {PLATEAU:.0%} after", f"below {COLLAPSED:.0%} after", "entropy at the end")
    rows = [
        (name, within(of_case, PLATEAU), within(of_case, COLLAPSED), " and ".join(f"{one[-1]:.1%}" for one in of_case))
        for name, of_case in curves.items()
    ]
    note = f"Updates, and shares of the maximal entropy, of {args.seeds} controllers each, with M = {args.M} policies."
    publish(args, [Table(f"A controller rewarded for {REWARDED}", header, rows, [note])], {"entropy": curves})
    if args.plot:
        draw(curves, args.plot)


def entropies(noise: float, floor: float, updates: int, M: int, seed: int) -> list[float]:
    """The entropy of the sampled policies at each update, as a share of its maximum."""
    source = build_policies(Config(M=M, seed=seed, entropy_floor=floor))
    draws, rewarded = functools.partial(keyed_generator, seed), PAPER_OPS.index(REWARDED)
    shares = []
    for update in range(updates):
        source.resample(draws("policies", update))
        chosen_MQK = source.op_MQK == source.rows[rewarded]
        highest_MQK = chosen_MQK & (source.level_MQK == source.levels - 1)
        reward_M = (chosen_MQK.double() + highest_MQK.double()).mean((1, 2))
        reward_M += noise * torch.randn(M, generator=draws("noise", update), dtype=torch.float64)
        source.observe(reward_M[None])
        shares.append(round(source.update()["entropy"] / source.largest_entropy, 4))
    return shares


def within(curves: list[list[float]], share: float) -> str:
    """The updates after which each of the curves is first below a share."""
    first = [next((str(update) for update, one in enumerate(curve) if one < share), "never") for curve in curves]
    return " and ".join(first)


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    for number, (name, of_case) in enumerate(curves.items()):
        for seed, curve in enumerate(of_case):
            percent = [100 * share for share in curve]
            axes.plot(percent, **line_style(number), label=None if seed else name)
    axes.set(xlabel="updates of the controller", ylabel="entropy (% of its maximum)", ylim=(0, 103))
    axes.grid(alpha=0.3)
    axes.legend(title="reward", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    exit_with_status(main)
