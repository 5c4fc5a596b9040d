"""What the README and the pages of docs/ show works, and what they name exists."""

import re

import pytest
import torch
from conftest import ROOT

from benchmarks.cost import published_confs
from config import Config
from policies import build_policies

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text(encoding="utf-8") for path in PAGES}


def test_the_operations_work_in_the_training_loop_shown():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT["README.md"], re.DOTALL)
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
    (text,) = re.findall(r"```yaml\n(policies:.*?)```", TEXT["policies.md"], re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    source = build_policies(Config(policy="recorded", policy_from=str(tmp_path / "mine.yaml"), M=2))
    source.resample(torch.Generator())
    assert source.by_name()[0] == [[("Rotate", 3), ("Invert", 0)], [("Solarize", 2)]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", TEXT[page.name]):
        target = page.parent / link if link else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, heading


def test_the_readme_names_every_script_folder_and_page():
    links = set(re.findall(r"\]\(([\w./]+)\)", TEXT["README.md"]))
    assert {path.name for path in ROOT.glob("*.py")} <= links
    assert {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")} <= links
    assert {f"docs/{path.name}" for path in PAGES[1:]} <= links


def test_every_test_that_the_pages_name_exists():
    named = {name for text in TEXT.values() for name in re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", text)}
    assert len(named) >= 10
    for name in sorted(named):
        file, _, test = name.partition("::")
        assert f"def {test or 'test_'}" in (ROOT / file).read_text(encoding="utf-8"), name


def test_the_results_table_has_every_conf():
    for path in published_confs():
        header = path.read_text(encoding="utf-8")
        link = re.escape(f"](../{path.relative_to(ROOT).as_posix()})")
        (row,) = re.findall(rf"^\|.*{link}.*$", TEXT["results.md"], re.MULTILINE)
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[6] == re.search(r"about ([\d.]+) GPU-hours", header).group(1)
        errors = re.findall(r"(\d+\.\d+(?: \+- \d+\.\d+)?) %", header.split("# Cost")[0])
        assert re.findall(r"\d+\.\d+(?: \+- \d+\.\d+)?", "|".join(cells[3:5])) == errors


def test_nothing_is_left_to_fill_in():
    assert not [name for name, text in TEXT.items() if re.search(r"^[A-Z]{4,}$|TODO|TBD", text, re.MULTILINE)]
