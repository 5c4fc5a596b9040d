"""What the README shows works, and what it names exists."""

import re

import torch
from conftest import ROOT

from benchmarks.cost import published_confs
from config import Config
from policies import build_policies

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_operations_work_in_the_training_loop_shown():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    images = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(32) % 2
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
    before = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scope = {"loader": [(images, labels)] * 3, "model": model, "optimizer": optimizer}
    exec(code, scope)
    assert not torch.equal(model[1].weight, before)
    assert torch.isfinite(scope["loss"])
    assert scope["images"].dtype == torch.uint8
    assert not torch.equal(scope["images"], images)


def test_the_file_of_policies_shown_can_be_used(tmp_path):
    (text,) = re.findall(r"```yaml\n(policies:.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    source = build_policies(Config(policy="recorded", policy_from=str(tmp_path / "mine.yaml"), M=2))
    source.resample(torch.Generator())
    assert source.by_name()[0] == [[("Rotate", 3), ("Invert", 0)], [("Solarize", 2)]]


def test_the_files_named_exist_and_every_module_is_in_the_map():
    links = set(re.findall(r"\]\(([\w./]+)\)", README))
    assert all((ROOT / link).exists() for link in links), links
    assert {path.name for path in ROOT.glob("*.py")} <= links


def test_every_promise_names_tests_that_exist():
    """docs/reliability.md, whose tables have a promise and its tests in each row."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!promise|exit|---|\d)(.*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 20
    for promise, shown_by in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", shown_by)
        assert named or shown_by == "the tests above", promise
        for file, test in named:
            assert f"def {test or 'test_'}" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


def test_the_results_table_has_every_conf():
    for path in published_confs():
        header = path.read_text(encoding="utf-8")
        (row,) = re.findall(rf"^\|.*\]\({path.relative_to(ROOT).as_posix()}\).*$", README, re.MULTILINE)
        assert row.split("|")[-2].strip() == re.search(r"about ([\d.]+) GPU-hours", header).group(1)
        errors = re.findall(r"(\d+\.\d+(?: \+- \d+\.\d+)?) %", header.split("# Cost")[0])
        assert re.findall(r"\d+\.\d+(?: \+- \d+\.\d+)?", "|".join(row.split("|")[3:5])) == errors


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"^[A-Z]{4,}$|TODO|TBD", README, re.MULTILINE)


def test_augmentations_can_be_lifted_out():
    """Its only imports are torch's and the standard library's."""
    text = (ROOT / "augmentations.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:import|from) ([\w.]+)", text, re.MULTILINE))
    assert {name.split(".")[0] for name in imported} == {"collections", "functools", "math", "torch", "typing"}
