"""The recipes of docs/extending.md work: every step is taken to the letter in a copy of the project."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
STEP = re.compile(r"^\d+\. (.*?)(?=^\d+\. |^\S|\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^   ```(?:python|bash)\n(.*?)^   ```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path):
    """A copy of the project's Python files and confs."""
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, tmp_path)
    folders = ["confs", "tests", "benchmarks", *(path.parent.name for path in ROOT.glob("*/__init__.py"))]
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def follow(recipe, project):
    """Take every step of a recipe. Returns the files of the project that it created or changed."""
    changed = set()
    for step in STEP.findall(RECIPES[recipe]):
        head = " ".join(step.split("```")[0].split())
        blocks = [re.sub("^   ", "", block, flags=re.MULTILINE) for block in BLOCK.findall(step)]
        if created := re.match(r"Create `(\S+)`", head):
            name, (text,) = created[1], blocks
            assert not (project / name).exists()
        elif replaced := re.match(r"In `(\S+)`, replace `(.+?)` by `(.+?)`", head):
            name, old, new = replaced.groups()
            text = (project / name).read_text(encoding="utf-8")
            assert text.count(old) == 1, head
            text = text.replace(old, new)
        elif added := re.match(r"In `(\S+)`, (before|after) `(.+?)`, add\b", head):
            (name, where, anchor), (addition,) = added.groups(), blocks
            lines = (project / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (place,) = (number for number, line in enumerate(lines) if anchor in line)
            place += where == "after"
            text = "".join([*lines[:place], addition, *lines[place:]])
        else:
            (commands,) = blocks
            for command in commands.splitlines():
                python, *arguments = shlex.split(command)
                assert python == "python"
                done = subprocess.run([sys.executable, *arguments], cwd=project, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
            continue
        (project / name).write_text(text, encoding="utf-8")
        changed.add(name)
    return changed


def test_an_operation_takes_a_kernel_a_row_and_its_pillow_reference(project):
    assert follow("An operation", project) == {"augmentations.py", "tests/test_augmentations.py"}
    policies = (project / "logs" / "blur" / "policies.jsonl").read_text()
    assert "Blur" in policies
    assert "Invert" not in policies


def test_a_network_takes_a_file_and_a_row(project):
    assert follow("A network", project) == {"models/smallcnn.py", "models/__init__.py"}
    assert (project / "logs" / "smallcnn" / "model.pt").exists()


def test_a_data_set_takes_a_function_a_row_and_a_name(project):
    (project / "mydigits").mkdir()
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        arrays = {"images": draw.integers(256, size=(200, 28, 28, 3), dtype=np.uint8), "labels": np.arange(200) % 10}
        np.savez(project / "mydigits" / f"{split}.npz", **arrays)
    assert follow("A data set of arrays", project) == {"datasets/loading.py", "config.py"}
    assert "own" in json.dumps(json.loads((project / "logs" / "digits" / "results.json").read_text()))


def test_a_source_of_policies_takes_a_class_a_row_and_a_name(project):
    assert follow("A source of policies", project) == {"policies/rising.py", "policies/__init__.py", "config.py"}
    lines = (project / "logs" / "rising" / "policies.jsonl").read_text().splitlines()
    highest = [
        max(level for policy in json.loads(line)["policies"] for sub in policy for _, level in sub) for line in lines
    ]
    assert highest[0] == 0 < highest[-1]
