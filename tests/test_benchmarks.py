"""Every script that measures runs, on sizes that say nothing of speed."""

import subprocess
import sys

from conftest import ROOT


def test_the_cost_of_reading_is_measured():
    command = [sys.executable, "benchmarks/scoring.py", "--model", "wresnet10_1", "--images", "20", "--repeats", "2"]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, check=True, capture_output=True, text=True)
    rows = done.stdout.splitlines()
    assert [row.split("  ")[0] for row in rows[:2]] == ["at hand", "mapped"]
    assert "reading adds" in rows[2]
