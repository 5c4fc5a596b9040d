"""The sections of a report: the verdict and the runs, curves, each run's policies, and what the operations do.

Shape suffixes: N images, P policies, Q sub-policies, K operations of one; H, W, C as usual; O operations, L levels.
"""

import dataclasses
import html
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from analysis import figures
from analysis.page import ReportImage, Section, html_table
from analysis.runs import (
    Draws,
    RunRecord,
    drawn_pairs,
    final_draws,
    held_out_accuracy,
    preferences_text,
    run_names,
    run_verdict,
)
from augmentations import OPS, apply, apply_op, row_of
from config import Config, plain_values
from policies.preferences import chance_range, favoured
from policies.recorded import RecordedPolicies, recorded
from utils import UserError, duration, keyed_generator, printable

IMAGES = 8  # shown under a policy
EXTREMES = 3  # hardest policies, and as many easiest ones
GALLERY_LEVELS = (0, 2, 4, 7, 9)
EXPLANATION = """\
<p>While an image classifier is trained, an adversary changes its training images and learns to make them hard. It
uses <b>policies</b>: M of them at a time, and every image of a batch is seen once under each. A policy consists of
sub-policies, of which one is drawn for every image. A sub-policy is a few <b>operations</b>, such as a rotation,
applied in order, each at a <b>level</b>. The adversary is a small network, the controller, that samples policies
and is rewarded by the classifier's loss under them. An <b>interval</b> is the time between two updates of the
controller, often an epoch. Entropy is 100 % of its maximum as long as every choice is uniformly random, and 0 when
one policy is left.</p>
<p>A preference is named only where chance does not explain it: operations are tested together (exact binomial
tails, Bonferroni, 5 % in all) and must be drawn at least a fifth more often than at random. Differences in accuracy
between single runs may be chance: <code>experiments.py</code> compares over several seeds.</p>"""
LEVELS = """<p>Levels are numbered from 0. The highest is not the strongest for every operation: some change nothing
there, some in the middle. ± means that the sign is drawn for each image. With a number of levels other than ten, the
first and the last level have the magnitudes given here.</p>"""
WHAT_CHANCE_DOES = (
    "Grey: the range that holds uniformly random shares with a probability of 95 % (exact binomial, {draws} draws per "
    "point; about one point in twenty lies outside by chance alone). Dotted: the uniform share, {chance:.2f} %. "
)


def summary(runs: Sequence[RunRecord]) -> Section:
    """Verdicts first, then a row for each run, the settings in which they differ, and how to read the page."""
    names = run_names(runs)
    text = "".join(
        f'<p class="verdict"><b>{html.escape(name)}</b>: {html.escape(run_verdict(run))}</p>\n'
        for run, name in zip(runs, names, strict=True)
    )
    header = ("run", "policy", "M", "epochs", "train accuracy", "final accuracy", "final error", "entropy", "collapsed")
    rows = [(name, *_summary_row(run)) for run, name in zip(runs, names, strict=True)]
    text += html_table((*header, "time"), rows)
    text += "<p>Final accuracy and error: on held-out or test images. Entropy: of the policies, as a share of its "
    text += "maximum, in the last interval.</p>"
    if differing := settings_that_differ(runs):
        text += "<p>Settings in which the runs differ:</p>" + html_table(("setting", *names), differing)
    return Section("Verdict", text + EXPLANATION, [])


def _summary_row(run: RunRecord) -> tuple[str, ...]:
    last, score, entropy = run.metrics[-1], run.final_accuracy, run.entropy_share
    collapsed = f"{run.collapsed_intervals} of {len(run.intervals)} intervals" if run.collapsed_intervals else "no"
    return (
        run.config.policy + (", reward: teacher" if run.config.has_teacher else ""),
        str(run.config.M),
        f"{last['epoch']} of {run.config.epochs}",
        f"{100 * last['train_top1']:.2f} %",
        "-" if score is None else f"{100 * score:.2f} %",
        "-" if score is None else f"{100 - 100 * score:.2f} %",
        "-" if entropy is None else f"{100 * entropy:.1f} %",
        collapsed if run.config.policy == "controller" else "-",
        duration(run.seconds),
    )


def settings_that_differ(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    values = [plain_values(run.config) for run in runs]
    return [
        (name, *(printable(str(of_run[name]), 100) for of_run in values))
        for name in values[0]
        if any(of_run[name] != values[0][name] for of_run in values)
    ]


def curves(runs: Sequence[RunRecord]) -> Section:
    of_runs = []
    for run, name in zip(runs, run_names(runs), strict=True):
        scored = [(one["epoch"], held_out_accuracy(one)) for one in run.metrics]
        held_out = [(epoch, 100 * score) for epoch, score in scored if score is not None]
        train = [(one["epoch"], 100 * one["train_top1"], one["train_loss"]) for one in run.metrics]
        of_runs.append(figures.Curve(name, train, held_out))
    caption = (
        "Left and middle: loss and accuracy on the augmented training images; hard policies keep the accuracy low even "
        "for a good network. Right: the accuracy on held-out or test images without augmentation; this is what counts."
    )
    return Section("Curves", "", [ReportImage("curves", "Training and accuracy", figures.curves(of_runs), caption)])


def policies(run: RunRecord, name: str, dataroot: str | None) -> Section:
    config, done = run.config, run.metrics[-1]["epoch"]
    text = f"{config.model} on {config.dataset}, policy: {config.policy}, M = {config.M}."
    if done < config.epochs:
        text += f" The run is not finished: {done} of {config.epochs} epochs are done."
    if run.intervals and not run.has_policies:
        text += " It uses no policies, or operations drawn for each image: there is no policy to show."
    return Section(f"Policies of {name}", f"<p>{html.escape(text)}</p>", _policy_images(run, dataroot))


def _policy_images(run: RunRecord, dataroot: str | None) -> Iterator[ReportImage]:
    if not run.intervals:
        return
    if run.maximal_entropy:
        yield entropy(run)
    if run.has_policies:
        draws = final_draws(run)
        yield from shares(run, draws)
        yield preferences_now(run, draws)
    yield loss_spread(run)
    if run.has_policies and len(run.intervals[-1]["losses"]) > 1:
        yield extremes(run, dataroot)


def entropy(run: RunRecord) -> ReportImage:
    epochs, maximum = run.epochs(run.intervals), run.maximal_entropy
    points = [(epoch, 100 * one["entropy"] / maximum) for epoch, one in zip(epochs, run.intervals, strict=True)]
    collapsed = [epoch for epoch, one in zip(epochs, run.intervals, strict=True) if one["collapsed"]]
    limit = 100 * run.config.collapse_entropy
    caption = (
        f"The mean entropy of a policy as a share of its maximum ({maximum:.2f} nats): 100 % if every choice is "
        f"uniformly random, 0 if one policy is left. Collapse is reported below {limit:.0f} %, or when one "
        "operation takes more than half of all draws"
    )
    caption += f": in {len(collapsed)} of {len(points)} intervals (red)." if collapsed else "; this did not happen."
    figure = figures.entropy(points, limit, collapsed)
    return ReportImage("entropy", "How undecided is the adversary?", figure, caption)


def shares(run: RunRecord, draws: Draws) -> Iterator[ReportImage]:
    """Shares of operations and of levels over the epochs, each beside what chance alone would give."""
    groups = figures.binned(run.intervals, figures.MOST_SHARES)
    epochs = [run.epochs(group)[-1] for group in groups]
    subjects = (
        ("operations", "Shares of the operations", run.ops, 0, draws.op_counts),
        ("levels", "Shares of the levels", list(range(run.levels)), 1, draws.level_counts),
    )
    for name, title, keys, place, counts in subjects:
        share_KT, draws_T = share_of(groups, keys, place)
        found = favoured(counts)
        panels = [str(key) if place == 0 else f"level {key}" for key in keys]
        chance_T = [chance_range(count, len(keys)) for count in draws_T]
        figure = figures.share_panels(epochs, panels, share_KT, chance_T, {one.name for one in found})
        together = f" A point is the mean of {len(groups[0])} intervals." if len(groups[0]) > 1 else ""
        caption = WHAT_CHANCE_DOES.format(draws=draws_T[0], chance=100 / max(1, len(keys))) + together
        now = preferences_text(found)
        caption += f" Now drawn {now} (red)." if now else f" None of the {name} differs from chance now."
        if place == 1:
            caption += " What a level does depends on the operation: see the last section."
        yield ReportImage(name, title, figure, caption)


def share_of(
    groups: Sequence[Sequence[Mapping[str, Any]]], keys: Sequence[Any], place: int
) -> tuple[list[list[float]], list[int]]:
    """The share of each key, an operation (place 0) or a level (1), in each group of intervals; each group's draws."""
    counted = [Counter(pair[place] for pair in drawn_pairs(group)) for group in groups]
    draws = [counts.total() for counts in counted]
    return [[counts[key] / max(1, counts.total()) for counts in counted] for key in keys], draws


def preferences_now(run: RunRecord, draws: Draws) -> ReportImage:
    """The share of every operation at every level, where it differs from chance."""
    table_OL = [[draws.pairs[name, level] for level in range(draws.levels)] for name in draws.ops]
    cells = len(draws.ops) * draws.levels
    low, high = chance_range(draws.total, cells, comparisons=cells)
    percent = (100 * torch.tensor(table_OL, dtype=torch.float64) / max(1, draws.total)).tolist()
    neutral = [neutral_level(name, draws.levels) for name in draws.ops]
    outside = sum(not low <= count / max(1, draws.total) <= high for row in table_OL for count in row)
    caption = (
        f"How often each operation is drawn at each level {draws.origin}, in per cent. White: the uniform share, "
        f"{100 / cells:.2f} %, and everything that chance explains, {100 * low:.2f} to {100 * high:.2f} % (exact "
        f"binomial range, Bonferroni over the {cells} cells, 5 % in all): "
    )
    caption += f"{outside} cells differ from chance." if outside else "no cell differs from chance."
    caption += " A ring marks the level at which an operation changes nothing."
    figure = figures.heat_map(percent, draws.ops, draws.levels, neutral, (100 * low, 100 / cells, 100 * high))
    return ReportImage("preferences", "What is drawn now, by operation and level", figure, caption)


def loss_spread(run: RunRecord) -> ReportImage:
    rows = []
    for group in figures.binned(run.intervals):
        losses = torch.tensor([one["losses"] for one in group], dtype=torch.float64)
        deviation = sum(one["loss_spread"] for one in group) / len(group)
        rows.append((run.epochs(group)[-1], losses.amin(1).mean(), losses.mean(), losses.amax(1).mean(), deviation))
    caption = (
        "The adversary's reward: the network's mean loss under each of the M policies of an interval. Band: from the "
        "easiest to the hardest policy; line: their mean. Below: their standard deviation. If it is no larger than in "
        "a run with policy=none, where only chance makes a difference, there is nothing to learn from."
    )
    return ReportImage("spread", "Do policies differ in difficulty?", figures.loss_spread(rows), caption)


def extremes(run: RunRecord, dataroot: str | None) -> ReportImage:
    """The hardest and the easiest policies of the last interval, applied to some images."""
    last = recorded(run.intervals[-1:], run.directory / "policies.jsonl")
    losses = torch.tensor(run.intervals[-1]["losses"])
    order, count = losses.argsort(descending=True).tolist(), min(EXTREMES, len(losses) // 2)
    chosen = order[:count] + order[-count:]
    source = RecordedPolicies(len(chosen), last.op_RPQK[:, chosen], last.level_RPQK[:, chosen], last.levels)
    images_NCHW, origin = some_images(run.config, dataroot)
    source.resample(keyed_generator("report", "policies"))
    plan = source.plan(len(images_NCHW), images_NCHW.shape[-2:], keyed_generator("report", "plan"))
    copies_BCHW = apply(images_NCHW.repeat_interleave(len(chosen), 0), plan)
    rows = [("unchanged", images_NCHW)]
    for place, (policy, text) in enumerate(zip(chosen, source.descriptions(), strict=True)):
        rank = "hardest" if place < count else "easiest"
        rows.append((f"{rank}, loss {losses[policy]:.3f}: {text}", copies_BCHW[place :: len(chosen)]))
    caption = (
        f"The hardest and the easiest policies of the last interval, by the network's loss, applied to {origin}. Each "
        "image draws one of a policy's sub-policies (separated by: or), whose operations are applied in order (then); "
        "± means that the sign is drawn for each image. With few policies, the order may be chance."
    )
    return ReportImage("policies", "The hardest and the easiest policies", figures.rows_of_images(rows), caption)


def some_images(config: Config, dataroot: str | None) -> tuple[Tensor, str]:
    """A few training images, one of each class, uint8 (N, C, H, W), and a description of where they are from."""
    from datasets.download import Downloads
    from datasets.loading import balanced_order, load_data

    own = dataclasses.replace(config, check_files=False, batch_size=1, dataroot=dataroot or config.dataroot)
    try:
        split = load_data(own, torch.device("cpu"), Downloads(None, False, quiet=True)).train
        origin = "the run's training images"
    except UserError:
        split = load_data(Config(dataset="shapes", batch_size=1), torch.device("cpu")).train
        origin = f"embedded shapes, because {config.dataset} was not found (name its place with --dataroot)"
    images_NCHW, _ = next(iter(split.batches([balanced_order(split.labels)[:IMAGES]])))
    return images_NCHW, origin


def operations(run: RunRecord, dataroot: str | None) -> Section:
    """Every operation at five of ten levels, on one image, and a table of what levels mean."""
    images_NCHW, origin = some_images(run.config, dataroot)
    count, rows = len(GALLERY_LEVELS), []
    for op in OPS:
        strength_L = torch.tensor([op.magnitude(level) for level in GALLERY_LEVELS], dtype=torch.float64)
        image_LCHW = images_NCHW[:1].expand(count, -1, -1, -1).contiguous()
        partner_LCHW = images_NCHW[1:2].expand(count, -1, -1, -1)
        needs = {"partner": partner_LCHW, "centre": torch.full((count, 2), 0.5, dtype=torch.float64)}
        extra = {op.needs: needs[op.needs]} if op.needs else {}
        captions = ["" if op.low is None else f"{strength:.3g}" for strength in strength_L.tolist()]
        rows.append((op.name, captions, apply_op(image_LCHW, op.name, strength_L, **extra)))
    caption = (
        f"Every operation at five levels on one of {origin}; above each image its magnitude, for signed operations the "
        "positive one. Operations without a magnitude do the same at every level."
    )
    image = ReportImage("operations", "Gallery", figures.operations(rows, GALLERY_LEVELS), caption)
    return Section("What operations and levels do", LEVELS + levels_table(), [image])


def levels_table() -> str:
    """The magnitudes of levels, for the default ten."""
    rows = []
    for op in OPS:
        if op.low is None:
            rows.append((op.name, "-", "-", "-", "has no strength"))
            continue
        level = neutral_level(op.name, 10)
        changes_nothing = "-" if level is None else f"{level:g}" if level == int(level) else "between 4 and 5"
        sign = "±" if op.signed else ""
        rows.append((op.name, f"{sign}{op.low:g}", f"{sign}{op.high:g}", changes_nothing, op.unit))
    return html_table(("operation", "level 0", "level 9", "changes nothing at level", "unit"), rows)


def neutral_level(name: str, levels: int) -> float | None:
    """The level, possibly between two, at which an operation changes nothing."""
    op = OPS[row_of(name)]
    return None if op.neutral is None else (op.neutral - op.low) / (op.high - op.low) * (levels - 1)
