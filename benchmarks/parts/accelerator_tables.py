"""The tables of benchmarks/accelerator.py, from the results of each part by name."""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring import Spread

from evaluation.text_table import Table


def exactness_table(results: dict[str, Any]) -> Table:
    rows = []
    for name, one in results.items():
        if "values" in one:
            wrong = sum(one["differing"].values())
            what = f"16 operations, every level and sign, compared with {name}, {one['images']} {one['of']}"
            rows.append((what, f"{wrong:,} of {one['values']:,} values differ"))
    outcomes: dict[str, Counter[str]] = {}
    for name, one in results.items():
        if "outcome" in one:
            test = re.sub(r"\[.*", "", name.partition("::")[2]).removeprefix("test_").replace("_", " ")
            outcomes.setdefault(test, Counter())[one["outcome"]] += 1
    rows += [(test, ", ".join(f"{n} {outcome}" for outcome, n in count.items())) for test, count in outcomes.items()]
    return Table("Exactness", ("what is checked", "result"), rows)


def step_table(results: dict[str, Any]) -> Table:
    best, steps = results.get("matrix product"), [one for one in results.values() if "model" in one]
    product, rows = best and best["flops_per_second"], []
    for one in steps:
        policies, bare = (Spread.of([1000 * s for s in one["seconds"][way]]).median for way in ("policies", "bare"))
        peak = one["memory"]
        rows.append(
            (
                f"{one['model']}, {one['precision']}",
                *(str(one[name]) for name in ("M", "N", "side")),
                f"{policies:,.1f}",
                f"{bare:,.1f}",
                Spread(*one["ratio"]).describe(".3f"),
                f"{one['copies_per_second']:,.0f}",
                f"{one['flops_per_second'] / 1e12:,.3g}",
                f"{one['flops_per_second'] / product:.1%}" if product else "-",
                "-" if one["waits"] is None else f"{one['waits']:g}",
                f"{peak['policies'] / 1e9:.2f} ({peak['policies'] / peak['bare'] - 1:+.1%})" if peak else "-",
            )
        )
    header = ("network", "M", "N", "side", "with policies, ms", "bare, ms", "with policies / bare", "copies/s")
    header += ("TFLOP/s", "of a matrix product's", "host waits", "peak, GB (to a bare step's)")
    side = best and f"{best['side']}x{best['side']}"
    note = [f"A product of {side} matrices in {best['dtype']} reaches {product / 1e12:,.3g} TFLOP/s."] if best else []
    return Table("A training step, medians (lowest to highest)", header, rows, note)


def operations_table(results: dict[str, Any]) -> Table:
    rows = {}
    for one in results.values():
        for way, measured in one["ways"].items():
            rate, to_pillow = (Spread(*measured[what]) for what in ("copies_per_second", "to_pillow"))
            side, numbers = f"{one['side']}x{one['side']}", (rate.describe(), to_pillow.describe(".1f"))
            rows.setdefault((side, way), (side, f"{one['copies']:,}", way, *numbers))
    title = "Two operations per copy, uint8 in and out, medians (lowest to highest)"
    return Table(title, ("side", "copies at a time", "way", "copies/s", "times Pillow's"), list(rows.values()))


def epoch_table(results: dict[str, Any]) -> Table:
    rows = []
    for name, one in results.items():
        who = f"{one['model']}, M = {one['M']}, N = {one['N']}"
        if name == "epoch":
            rate = f"{one['seconds']:,.1f} s ({one['copies_per_second']:,.0f} copies/s)"
            rows.append((f"{who}: an epoch of {one['images']:,} images", rate))
        else:
            ratio = f"{Spread(*one['ratio']).describe('.3f')} of a plain step's time"
            rows.append((f"{who}: {name}=true", f"{ratio}; the first step takes {one['first']:,.1f} s"))
    return Table("An epoch", ("what", "result"), rows)


def training_table(results: dict[str, Any]) -> Table:
    rows = []
    for arm, one in results.items():
        scores = (f"{100 * one['error']:.2f}", f"{one['images']:,}, {one['dataset']}") if "error" in one else ("-", "-")
        rows.append((arm, one["state"], *scores))
    header = ("arm", "state", "test error (%)", "test images")
    return Table("Training: experiments.py controls, seed 0", header, rows)
