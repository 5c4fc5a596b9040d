"""One page of pictures about runs: what the adversary learned, and how the network fared beside the controls.

    python report.py logs/advaa                                    # logs/advaa/report/report.html, and PNGs beside it
    python report.py logs/advaa logs/random logs/none --output page

The page holds all its pictures and asks for nothing from anywhere. It can be made while a run is under way.

Shape suffixes: N images, P policies, Q sub-policies, K operations of one; H, W, C as usual; O operations, L levels.
"""

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before all that takes its time to import

import dataclasses
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from analysis import figures
from analysis.page import Part, Picture, html_table, levels_table, neutral_level, write_page
from augmentations import OPS, apply, apply_op, row_of
from config import Config, load_config, plain_values
from controller import Controller
from datasets.download import Downloads
from datasets.loading import balanced_order, load_data
from evaluation.plots import figure_class
from policies.files import read_controller, recorded
from policies.sources import RecordedPolicies
from training.exit import exit_with_status
from utils import CommandLine, UserError, duration, has_shape, keyed_generator, printable, warn

SAMPLED = 2000  # policies of the controller, for what it believes
RECENT = 20  # intervals that stand for the present where there is no controller
IMAGES = 8  # shown under a policy
EXTREMES = 3  # strongest policies, and as many weakest ones
LEVELS = """<p>Levels are numbered from 0. The highest is not the strongest for every operation: some change nothing
there, some in the middle. ± says that the sign is drawn for each image. With another number of levels than ten, the
first and the last have the magnitudes given here.</p>"""
NUMBER = (int, float)
METRICS = {"epoch": int, "step": int, "train_loss": NUMBER, "train_top1": NUMBER}
INTERVAL = {
    "step": int, "policies": list, "losses": [NUMBER], "entropy": NUMBER, "loss_spread": NUMBER,
    "collapsed": (str, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run's directory holds, as far as it has come."""

    directory: Path
    config: Config
    metrics: list[dict[str, Any]]
    intervals: list[dict[str, Any]]
    seconds: float

    @property
    def name(self) -> str:
        return printable(self.directory.resolve().name, 80)

    @property
    def steps_per_epoch(self) -> float:
        return self.metrics[-1]["step"] / self.metrics[-1]["epoch"]

    @property
    def has_policies(self) -> bool:
        """Whether its records name operations; those of a control, or drawn for each image, do not."""
        return any(subpolicy for policy in self.intervals[-1]["policies"] for subpolicy in policy)

    def epochs(self, intervals: Sequence[Mapping[str, Any]]) -> list[float]:
        """Where intervals end, in epochs."""
        return [interval["step"] / self.steps_per_epoch for interval in intervals]


def main() -> None:
    args = parse_arguments()
    if figure_class() is None:
        raise UserError("report.py needs matplotlib: pip install -r requirements-dev.txt")
    runs = [read_run(directory) for directory in dict.fromkeys(args.runs)]
    folder = args.output or args.runs[0] / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another place with --output") from None
    meaning = Part("What a level means", LEVELS + levels_table(), [what_operations_do(runs[0], args.dataroot)])
    parts = [meaning, Part("All runs", about_all(runs), [in_common(runs)])]
    names = names_of(runs)
    parts += [Part(name, about(run), pictures_of(run, args.dataroot)) for name, run in zip(names, runs, strict=True)]
    print(write_page(parts, folder))


def read_run(directory: Path) -> Run:
    """Raises UserError for what is no run, or has not finished an epoch."""
    if not (directory / "config.yaml").exists():
        raise UserError(f"{directory}: is no run's directory (it has no config.yaml); name one below logs/")
    config = load_config(directory / "config.yaml", {})
    metrics = read_lines(directory / "metrics.jsonl", METRICS)
    if not metrics:
        raise UserError(f"{directory}: has not finished an epoch yet; there is nothing to show")
    intervals = read_lines(directory / "policies.jsonl", INTERVAL)
    for interval in intervals:
        if interval["policies"]:  # there are none where each image draws for itself
            recorded([interval], directory / "policies.jsonl")
    times = read_lines(directory / "times.jsonl", {})
    seconds = sum(one.get("train_seconds", 0.0) + one.get("other_seconds", 0.0) for one in times)
    return Run(directory, config, metrics, intervals, seconds)


def read_lines(path: Path, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of a jsonl file, which a run may be about to write on: a last line that is cut short does not count."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: is damaged; put a copy back") from None
    if not has_shape(records, [shape]):
        raise UserError(f"{path}: is not of this version of main.py, or damaged")
    return records


def what_operations_do(run: Run, dataroot: str | None) -> Picture:
    """Every operation at five of ten levels, on one image."""
    images_NCHW, origin = some_images(run.config, dataroot)
    levels, rows = (0, 2, 4, 7, 9), []
    for op in OPS:
        strength_L = torch.tensor([op.magnitude(level) for level in levels], dtype=torch.float64)
        image_LCHW, other = images_NCHW[:1].expand(5, -1, -1, -1).contiguous(), images_NCHW[1:2].expand(5, -1, -1, -1)
        needs = {"partner": other, "centre": torch.full((5, 2), 0.5, dtype=torch.float64)}
        extra = {op.needs: needs[op.needs]} if op.needs else {}
        captions = ["" if op.low is None else f"{strength:.3g}" for strength in strength_L.tolist()]
        rows.append((op.name, captions, apply_op(image_LCHW, op.name, strength_L, **extra)))
    words = (
        f"Every operation at five levels, above each image its magnitude, on one of {origin}; of those that have a "
        "sign the positive one is shown. AutoContrast, Invert and Equalize do the same at every level."
    )
    return Picture("operations", "What the operations do", figures.operations(rows, levels), words)


def in_common(runs: Sequence[Run]) -> Picture:
    curves = []
    for run, name in zip(runs, names_of(runs), strict=True):
        scored = [one for one in run.metrics if "valid_top1" in one or "test_top1" in one]
        held_out = [(one["epoch"], 100 * one.get("valid_top1", one.get("test_top1"))) for one in scored]
        train = [(one["epoch"], 100 * one["train_top1"], one["train_loss"]) for one in run.metrics]
        curves.append(figures.Curve(name, train, held_out))
    words = (
        "Every run by its epochs. Left: the loss on the training images as the network meets them, augmented. Middle: "
        "the share of those that it gets right; where policies are hard, it is low even for a good network. Right: the "
        "share that it gets right of images that it has never met, as they are (held-out or test images): this is what "
        "counts. Controls, such as random policies or none, belong beside a learned adversary."
    )
    return Picture("curves", "Training and held-out accuracy", figures.curves(curves), words)


def pictures_of(run: Run, dataroot: str | None) -> Iterator[Picture]:
    """All that there is to see of one run's policies."""
    if not run.intervals:
        return
    if run.has_policies:
        yield from shares(run)
    if run.config.policy in ("controller", "random"):
        yield entropy(run)
    yield spread(run)
    if run.has_policies and run.config.M > 1:
        yield extremes(run, dataroot)
    if run.has_policies:
        yield beliefs(run)


def shares(run: Run) -> Iterator[Picture]:
    names = [op.name for op in OPS if op.name in drawn_operations(run)]
    groups = figures.binned(run.intervals)
    epochs = [run.epochs(group)[-1] for group in groups]
    draws = sum(len(subpolicy) for policy in run.intervals[0]["policies"] for subpolicy in policy)
    together = f", each point the mean of {len(groups[0])} intervals" if len(groups[0]) > 1 else ""
    how = f"An interval draws {draws} operations{together}. Drawn evenly, each of {{}} would have {{:.1f}} %."
    yield Picture(
        "operations",
        "Which operations the policies hold",
        figures.stacked(epochs, names, share_of(groups, names, 0), "operations drawn (%)", sequential=False),
        "The share of each operation in the policies, one upon the other, over the training. A band that widens is an "
        "operation that the adversary has come to prefer; dotted lines mark equal shares. "
        + how.format(len(names), 100 / len(names)),
    )
    levels = list(range(run.intervals[0].get("levels", run.config.levels)))
    yield Picture(
        "levels",
        "How strongly they are applied",
        figures.stacked(epochs, levels, share_of(groups, levels, 1), "levels drawn (%)", sequential=True),
        "Likewise the share of each level. What a level does depends on the operation (see the table above): the "
        "highest is the strongest for most, but changes nothing for Solarize and Posterize, and the middle changes "
        "nothing for Contrast, Color, Brightness and Sharpness. " + how.format(len(levels), 100 / len(levels)),
    )


def drawn_operations(run: Run) -> set[str]:
    of_policies = (policy for interval in run.intervals for policy in interval["policies"])
    return {name for policy in of_policies for subpolicy in policy for name, _ in subpolicy}


def share_of(groups: Sequence[Sequence[Mapping[str, Any]]], keys: Sequence[Any], place: int) -> list[list[float]]:
    """Of each key, an operation (place 0) or a level (1), its share in every group of intervals."""
    place_of = {key: number for number, key in enumerate(keys)}
    table = torch.zeros(len(keys), len(groups), dtype=torch.float64)
    for column, group in enumerate(groups):
        for interval in group:
            for pair in (pair for policy in interval["policies"] for subpolicy in policy for pair in subpolicy):
                table[place_of[pair[place]], column] += 1
    return (table / table.sum(0).clamp(min=1)).tolist()


def entropy(run: Run) -> Picture:
    own = run.config
    largest = own.Q * own.K * (math.log(len(own.ops)) + math.log(own.levels))
    points = [(epoch, one["entropy"]) for epoch, one in zip(run.epochs(run.intervals), run.intervals, strict=True)]
    collapsed = [epoch for epoch, one in zip(run.epochs(run.intervals), run.intervals, strict=True) if one["collapsed"]]
    words = (
        "How undecided the adversary is: the mean entropy of a policy, in nats. At the upper line every choice is "
        "uniformly random; at 0 there is only one policy left. Below the lower line "
        f"({own.collapse_entropy:.0%} of the maximum), or when one operation takes more than half of all draws, the "
        "run says that its controller has collapsed"
    )
    words += f"; it did so in {len(collapsed)} of {len(points)} intervals (red)." if collapsed else "; it did not."
    figure = figures.entropy(points, largest, own.collapse_entropy * largest, collapsed)
    return Picture("entropy", "Is the adversary still undecided?", figure, words)


def spread(run: Run) -> Picture:
    groups = figures.binned(run.intervals)
    rows = []
    for group in groups:
        losses = torch.tensor([one["losses"] for one in group], dtype=torch.float64)
        deviation = sum(one["loss_spread"] for one in group) / len(group)
        rows.append((run.epochs(group)[-1], losses.amin(1).mean(), losses.mean(), losses.amax(1).mean(), deviation))
    words = (
        "What the adversary is rewarded for: the network's mean loss (nats) under each of the M policies of an "
        "interval. Band: from the easiest to the hardest policy; line: their mean. Below, their standard deviation: "
        "where it is as small as chance alone makes it, there is nothing to learn from. For the control without "
        "policies it shows what chance makes."
    )
    return Picture("spread", "Do policies differ in difficulty?", figures.spread(rows), words)


def extremes(run: Run, dataroot: str | None) -> Picture:
    """The hardest and the easiest policies of the last interval, with what they make of some images."""
    last = recorded(run.intervals[-1:], run.directory / "policies.jsonl")
    losses = torch.tensor(run.intervals[-1]["losses"])
    order, count = losses.argsort(descending=True).tolist(), min(EXTREMES, len(losses) // 2)
    chosen = order[:count] + order[-count:]
    source = RecordedPolicies(len(chosen), last.op_RPQK[:, chosen], last.level_RPQK[:, chosen], last.levels)
    images_NCHW, origin = some_images(run.config, dataroot)
    source.resample(keyed_generator("report", "policies"))
    plan = source.plan(len(images_NCHW), images_NCHW.shape[-2:], keyed_generator("report", "plan"))
    copies_BCHW = apply(images_NCHW.repeat_interleave(len(chosen), 0), plan)
    rows = [("as they are", images_NCHW)]
    for place, (policy, words) in enumerate(zip(chosen, source.describe(), strict=True)):
        rank = "hardest" if place < count else "easiest"
        rows.append((f"{rank}, loss {losses[policy]:.3f}: {words}", copies_BCHW[place :: len(chosen)]))
    words = (
        "The hardest and the easiest policies of the last interval, by the network's loss, and what they make of "
        f"{origin}. Each image draws one of a policy's sub-policies (between them: or), whose operations follow each "
        "other (then); ± says that the sign is drawn for each image."
    )
    return Picture("policies", "The hardest and the easiest policies", figures.rows_of_images(rows), words)


def some_images(config: Config, dataroot: str | None) -> tuple[Tensor, str]:
    """A few training images, one of each class, (N, C, H, W), and whose they are in words."""
    own = dataclasses.replace(config, check_files=False, batch_size=1, dataroot=dataroot or config.dataroot)
    try:
        split = load_data(own, torch.device("cpu"), Downloads(None, False, quiet=True)).train
        origin = "the run's training images"
    except UserError:
        shapes = Config(dataset="shapes", batch_size=1)
        split = load_data(shapes, torch.device("cpu")).train
        origin = f"embedded shapes, for {config.dataset}'s images are not at hand (--dataroot says where they lie)"
    images_NCHW, _ = next(iter(split.batches([balanced_order(split.labels)[:IMAGES]])))
    return images_NCHW, origin


def beliefs(run: Run) -> Picture:
    """What the controller would draw now; without one, what was drawn last."""
    if found := learned(run):
        controller, ops, levels = found
        decisions = controller.sample(SAMPLED, keyed_generator("report", "beliefs"))
        rows = torch.tensor([row_of(name) for name in ops])
        op, level = rows[decisions.op_MQK].flatten(), decisions.level_MQK.flatten()
        origin = f"in {SAMPLED:,} policies ({len(op):,} operations) sampled from the controller as it is now"
    else:
        last = recorded(run.intervals[-RECENT:], run.directory / "policies.jsonl")
        op, level, levels = last.op_RPQK.flatten(), last.level_RPQK.flatten(), last.levels
        op, level = op[op >= 0], level[op >= 0]
        ops = run.config.ops if run.config.policy == "random" else [OPS[row].name for row in op.unique().tolist()]
        count = min(RECENT, len(run.intervals))
        origin = f"in the {len(op):,} operations of the last {count} intervals, for there is no controller to ask"
    names = [name for name in (one.name for one in OPS) if name in ops]
    table_OL = torch.stack([torch.bincount(level[op == row_of(name)], minlength=levels) for name in names]).double()
    neutral = [neutral_level(name, levels) for name in names]
    words = (
        f"How often each operation comes at each level {origin}, in per cent. Drawn evenly, each field would have "
        f"{100 / table_OL.numel():.2f} %. A ring marks the level at which an operation changes nothing; operations "
        "without one have no strength."
    )
    figure = figures.heat_map((100 * table_OL / table_OL.sum()).tolist(), names, levels, neutral)
    return Picture("beliefs", "What the controller believes now", figure, words)


def learned(run: Run) -> tuple[Controller, tuple[str, ...], int] | None:
    """The run's controller, its operations and number of levels; None where there is none that can be read."""
    try:
        return read_controller(run.directory) if run.config.policy == "controller" else None
    except UserError as error:
        warn(str(error))
        return None


def names_of(runs: Sequence[Run]) -> list[str]:
    """Of their directories, with the folder above where two have the same."""
    names = [run.name for run in runs]
    above = [printable(run.directory.resolve().parent.name, 80) for run in runs]
    return [f"{a}/{name}" if names.count(name) > 1 else name for a, name in zip(above, names, strict=True)]


def about_all(runs: Sequence[Run]) -> str:
    header = ("run", "policies", "M", "epochs", "train accuracy", "held-out or test accuracy", "collapsed", "time")
    rows = []
    for run, name in zip(runs, names_of(runs), strict=True):
        last = run.metrics[-1]
        scores = [one.get("valid_top1", one.get("test_top1")) for one in run.metrics]
        score = next((f"{100 * one:.2f} %" for one in reversed(scores) if one is not None), "-")
        collapsed = sum(one["collapsed"] is not None for one in run.intervals)
        policy = run.config.policy + (", reward: teacher" if run.config.has_teacher else "")
        epochs = f"{last['epoch']} of {run.config.epochs}"
        told = f"{collapsed} of {len(run.intervals)} intervals" if run.config.policy == "controller" else "-"
        accuracy = f"{100 * last['train_top1']:.2f} %"
        rows.append((name, policy, str(run.config.M), epochs, accuracy, score, told, duration(run.seconds)))
    differing = settings_that_differ(runs)
    text = html_table(header, rows)
    if differing:
        text += "<p>Settings in which the runs differ:</p>" + html_table(("setting", *names_of(runs)), differing)
    return text


def settings_that_differ(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    values = [plain_values(run.config) for run in runs]
    return [
        (name, *(printable(str(of_run[name]), 100) for of_run in values))
        for name in values[0]
        if any(of_run[name] != values[0][name] for of_run in values)
    ]


def about(run: Run) -> str:
    config, done = run.config, run.metrics[-1]["epoch"]
    words = f"{config.model} on {config.dataset}, policy: {config.policy}, M = {config.M}."
    if done < config.epochs:
        words += f" It is under way, or has stopped: {done} of {config.epochs} epochs are done."
    if run.intervals and not run.has_policies:
        words += " Its policies are none, or drawn for each image by itself: there is no policy to show."
    return f"<p>{html.escape(words)}</p>"


def parse_arguments() -> Any:
    parser = CommandLine(prog="report.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: report, below the first run")
    parser.add_argument("--dataroot", metavar="DIR", help="where the run's images lie, if not where the run says")
    return parser.parse_args()


if __name__ == "__main__":
    exit_with_status(main)
