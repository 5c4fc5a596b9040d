"""The sections of a report: the verdict and the runs, curves, each run's policies, and what the operations do.

Shape suffixes: N images, P policies, Q sub-policies, K operations of one; H, W, C as usual; O operations, L levels.
"""

import dataclasses
import html
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from analysis import figures
from analysis.page import ReportImage, Section, html_table
from analysis.runs import RunRecord, draw_counts, drawn_pairs, final_draws, run_names, run_verdict
from augmentations import OPS, Op, apply, apply_op
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


def summary(runs: Sequence[RunRecord]) -> Section:
    """Verdicts first, then a row for each run, the settings in which they differ, and how to read the page."""
    names = run_names(runs)
    text = "".join(
        f'<p class="verdict"><b>{html.escape(name)}</b>: {html.escape(run_verdict(run))}</p>\n'
        for run, name in zip(runs, names, strict=True)
    )
    header = ("run", "policy", "M", "epochs", "train accuracy", "final accuracy", "entropy", "collapsed", "time")
    text += html_table(header, [(name, *_summary_row(run)) for run, name in zip(runs, names, strict=True)])
    text += (
        "<p>Final accuracy: on held-out or test images. Entropy: of the policies, as a share of its maximum, in the "
    )
    text += "last interval. Collapsed: share of the intervals.</p>"
    values = [plain_values(run.config) for run in runs]
    differing = [key for key in values[0] if any(of_run[key] != values[0][key] for of_run in values)]
    if differing:
        rows = [(key, *(printable(str(of_run[key]), 100) for of_run in values)) for key in differing]
        text += "<p>Settings in which the runs differ:</p>" + html_table(("setting", *names), rows)
    return Section("Verdict", text + EXPLANATION, [])


def _summary_row(run: RunRecord) -> tuple[str, ...]:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.2f} %"

    last, held_out = run.metrics[-1], run.held_out
    return (
        run.config.policy + (", reward: teacher" if run.config.has_teacher else ""),
        str(run.config.M),
        f"{last['epoch']} of {run.config.epochs}",
        percent(last["train_top1"]),
        percent(held_out[-1][1] if held_out else None),
        percent(run.entropy_share),
        percent(
            run.collapsed_intervals / len(run.intervals)
            if run.intervals and run.config.policy == "controller"
            else None
        ),
        duration(run.seconds),
    )


def curves(runs: Sequence[RunRecord]) -> Section:
    of_runs = {
        name: (
            [(one["epoch"], one["train_loss"]) for one in run.metrics],
            [(one["epoch"], 100 * one["train_top1"]) for one in run.metrics],
            [(epoch, 100 * accuracy) for epoch, accuracy in run.held_out],
        )
        for run, name in zip(runs, run_names(runs), strict=True)
    }
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
    images = []
    if run.intervals and run.maximal_entropy:
        images.append(entropy(run))
    if run.has_policies:
        pairs, origin = final_draws(run)
        images += [shares(run, pairs, "operations"), shares(run, pairs, "levels"), preferences_now(run, pairs, origin)]
    elif run.intervals:
        text += " It uses no policies, or operations drawn for each image: there is no policy to show."
    if run.intervals:
        images.append(loss_spread(run))
    if run.has_policies and len(run.intervals[-1]["losses"]) > 1:
        images.append(extremes(run, dataroot))
    return Section(f"Policies of {name}", f"<p>{html.escape(text)}</p>", images)


def entropy(run: RunRecord) -> ReportImage:
    epochs, maximum = run.epochs(run.intervals), run.maximal_entropy
    points = [(epoch, 100 * one["entropy"] / maximum) for epoch, one in zip(epochs, run.intervals, strict=True)]
    collapsed = [epoch for epoch, one in zip(epochs, run.intervals, strict=True) if one["collapsed"]]
    caption = (
        f"The mean entropy of a policy as a share of its maximum ({maximum:.2f} nats): 100 % if every choice is "
        f"uniformly random, 0 if one policy is left. Collapse is reported below {100 * run.config.collapse_entropy:.0f}"
        f" %, or when one operation takes more than half of all draws: in {len(collapsed)} of {len(points)} intervals."
    )
    if run.floors:
        caption += " Dotted: the floor at which the controller is held (entropy_floor)."
    floor = [(epoch, 100 * share) for epoch, share in zip(epochs, run.floors, strict=False)]
    return ReportImage("entropy", "How undecided is the adversary?", figures.entropy(points, collapsed, floor), caption)


def shares(run: RunRecord, pairs: Sequence[tuple[str, int]], kind: str) -> ReportImage:
    """Shares of the "operations" or of the "levels" over the epochs, beside what chance alone would give."""
    groups = figures.binned(run.intervals, figures.MOST_SHARES)
    counts_T = [draw_counts(drawn_pairs(group), run, kind) for group in groups]
    found = [one.name for one in favoured(draw_counts(pairs, run, kind))]
    caption = (
        "Grey: the range that holds uniformly random shares with a probability of 95 % (exact binomial, "
        f"{sum(counts_T[0].values())} draws per point; about one point in twenty lies outside by chance alone). "
        f"Dotted: the uniform share, {100 / max(1, len(counts_T[0])):.2f} %. "
    )
    if len(groups[0]) > 1:
        caption += f"A point is the mean of {len(groups[0])} intervals. "
    if found:
        caption += f"Now drawn more often than chance explains (red): {', '.join(found)}."
    else:
        caption += f"None of the {kind} differs from chance now."
    figure = figures.share_panels([run.epochs(group)[-1] for group in groups], counts_T, found)
    return ReportImage(kind, f"Shares of the {kind}", figure, caption)


def preferences_now(run: RunRecord, pairs: Sequence[tuple[str, int]], origin: str) -> ReportImage:
    """The share of every operation at every level, where it differs from chance."""
    counted, draws, cells = Counter(pairs), max(1, len(pairs)), len(run.ops) * run.levels
    percent_OL = [[100 * counted[name, level] / draws for level in range(run.levels)] for name in run.ops]
    low, high = (100 * bound for bound in chance_range(len(pairs), cells, comparisons=cells))
    outside = sum(not low <= percent <= high for row in percent_OL for percent in row)
    caption = (
        f"How often each operation is drawn at each level {origin}, in per cent. White: the uniform share, "
        f"{100 / cells:.2f} %, and everything that chance explains, {low:.2f} to {high:.2f} % (exact "
        f"binomial range, Bonferroni over the {cells} cells, 5 % in all): "
    )
    caption += f"{outside} cells differ from chance." if outside else "no cell differs from chance."
    figure = figures.heat_map(percent_OL, run.ops, (low, 100 / cells, high))
    return ReportImage("preferences", "What is drawn now, by operation and level", figure, caption)


def loss_spread(run: RunRecord) -> ReportImage:
    rows = []
    for group in figures.binned(run.intervals):
        losses = torch.tensor([one["losses"] for one in group], dtype=torch.float64)
        means = (losses.amin(1).mean(), losses.mean(), losses.amax(1).mean())
        rows.append((run.epochs(group)[-1], *(mean.item() for mean in means)))
    caption = (
        "The adversary's reward: the network's mean loss under each of the M policies of an interval. Band: from the "
        "easiest to the hardest policy; line: their mean. If the band is no wider than in a run with policy=none, "
        "where only chance makes a difference, there is nothing to learn from."
    )
    return ReportImage("spread", "Do policies differ in difficulty?", figures.loss_spread(rows), caption)


def extremes(run: RunRecord, dataroot: str | None) -> ReportImage:
    """The hardest and the easiest policies of the last interval, applied to some images."""
    last = run.intervals[-1]
    losses = torch.tensor(last["losses"])
    order, count = losses.argsort(descending=True).tolist(), min(EXTREMES, len(losses) // 2)
    chosen = order[:count] + order[-count:]
    policies = [last["policies"][policy] for policy in chosen]
    source = RecordedPolicies(len(chosen), recorded([last | {"policies": policies}], run.directory / "policies.jsonl"))
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
    """Every operation at five of ten levels, on one image, and what its levels mean."""
    images_NCHW, origin = some_images(run.config, dataroot)
    count, rows = len(GALLERY_LEVELS), []
    for op in OPS:
        strength_L = torch.tensor([op.magnitude(level) for level in GALLERY_LEVELS], dtype=torch.float64)
        image_LCHW = images_NCHW[:1].expand(count, -1, -1, -1).contiguous()
        partner_LCHW = images_NCHW[1:2].expand(count, -1, -1, -1)
        needs = {"partner": partner_LCHW, "centre": torch.full((count, 2), 0.5, dtype=torch.float64)}
        extra = {op.needs: needs[op.needs]} if op.needs else {}
        rows.append((operation_caption(op), apply_op(image_LCHW, op.name, strength_L, **extra)))
    caption = (
        f"Every operation at the levels {', '.join(map(str, GALLERY_LEVELS))} of ten on one of {origin}, signed "
        "operations with the positive sign."
    )
    image = ReportImage("operations", "Gallery", figures.rows_of_images(rows), caption)
    return Section("What operations and levels do", LEVELS, [image])


def operation_caption(op: Op) -> str:
    """The magnitudes of the first and the last of ten levels, and the level that changes nothing."""
    if op.low is None:
        return f"{op.name}: the same at every level"
    sign = "±" if op.signed else ""
    text = f"{op.name}: {sign}{op.low:g} to {sign}{op.high:g} {op.unit}"
    if op.neutral is None:
        return text
    return f"{text}, no change at level {9 * (op.neutral - op.low) / (op.high - op.low):g}"
