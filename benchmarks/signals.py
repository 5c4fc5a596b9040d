"""What a step costs with each source of policies, with a teacher, an average, mixed images, and half of the copies.

    python benchmarks/signals.py [--load_conf confs/cifar10/wresnet40x2_cifar10.yaml --amp] [--steps 3] [--repeats 7]
    python benchmarks/signals.py --memory       # also the peak memory of each, in a process of its own

They take their steps in turn, from the same noise, and are compared with the controller rewarded by the loss. AugMix
makes four views of every copy. Passes: for each image, a forward pass counts 1, a forward and backward pass 3.
"""

import dataclasses
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring import Spread, count, parse, parser, publish, ratios, take_turns
from step import Steps, peak_alone, timed_steps

from config import DEFAULT_CONF, PER_IMAGE, add_setting_arguments, load_config, overrides_from
from evaluation.text_table import Table
from training.distributed import join
from training.exit import exit_with_status

LEARNED = "controller"


def main() -> None:
    arguments = parser(__doc__)
    add_setting_arguments(arguments)
    arguments.add_argument("--amp", action="store_true", help="mixed precision")
    arguments.add_argument("--steps", type=count, default=3, help="of each measurement (default: %(default)s)")
    arguments.add_argument("--memory", action="store_true", help="also measure peak memory")
    args = parse(arguments)
    base = load_config(args.load_conf or DEFAULT_CONF, overrides_from(args))
    base = dataclasses.replace(base, entropy_floor=0.0, entropy_floor_end=None, keep=None)
    configs = {policy: dataclasses.replace(base, policy=policy) for policy in (LEARNED, "random", "none", *PER_IMAGE)}
    for option in ({"ema": 0.999}, {"mixup": 0.2}, {"cutmix": 1.0}):
        (name,) = option
        configs[f"{LEARNED}, {name}"] = dataclasses.replace(base, policy=LEARNED, **option)
    configs[f"{LEARNED}, reward: teacher"] = dataclasses.replace(base, policy=LEARNED, reward="teacher")
    if half := base.M // 2:
        keep = {"policy": "random", "keep": half}
        configs[f"random, {half} of {base.M} kept"] = dataclasses.replace(base, **keep)
        margin = {"keep_by": "margin", "reward": "teacher"}
        configs[f"random, {half} of {base.M} kept by margin"] = dataclasses.replace(base, **keep, **margin)
    memory = {name: peak_alone(config, "policies", args) for name, config in configs.items()} if args.memory else {}
    with join(args.device) as world:
        cases = {}
        for name, config in configs.items():
            steps = Steps(config, world)
            cases[name] = functools.partial(timed_steps, steps, steps.with_policies, args.steps)
        seconds = {
            name: [took / args.steps for took in turns] for name, turns in take_turns(cases, args.repeats).items()
        }
    to = {name: ratios(values, seconds[LEARNED]) for name, values in seconds.items()}
    passes = {name: config.passes for name, config in configs.items()}
    rows = [
        (name, str(passes[name]), f"{1000 * Spread.of(seconds[name]).median:,.0f}", to[name].describe(".3f"))
        + ((f"{memory[name] / 1e6:,.0f}",) if memory else ())
        for name in cases
    ]
    title = f"A step of {base.model}, N = {base.batch_size}, M = {base.M}"
    measured = {
        "model": base.model,
        "N": base.batch_size,
        "M": base.M,
        "seconds": seconds,
        "ratios": to,
        "passes": passes,
        "memory": memory,
    }
    header = ["policies", "passes", "ms", f"relative to {LEARNED}", *(["peak, MB"] if memory else [])]
    publish(args, [Table(title, header, rows)], measured)


if __name__ == "__main__":
    exit_with_status(main)
