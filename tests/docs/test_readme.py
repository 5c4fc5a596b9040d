"""What the README and the pages of docs/ show works, and what they name exists."""

import math
import re

import pytest
import torch
from conftest import ROOT

from augmentations import OPS, Augment, read_operation
from benchmarks.cost import published_confs
from config import Config
from dataloader import Normalise
from models import build_model
from policies import build_policies
from utils import load_tensors

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text(encoding="utf-8") for path in PAGES}


def example(page, words):
    """The one block of Python on the page that contains the words."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT[page], re.DOTALL) if words in code]
    return code


def test_the_operations_work_in_the_training_loop_shown():
    code = example("README.md", "Augment()")
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


def test_published_lists_are_converted_as_their_projects_apply_them(tmp_path, monkeypatch):
    code = example("policies.md", "def from_autoaugment")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert len(Augment.from_file("theirs.json").plan(4, (8, 8)).op_BK) == 4
    numbers = dict.fromkeys(("AutoContrast", "Invert", "Equalize"), 0)
    for m in (0, 1, 2, 4, 6.5):  # AutoAugment: a share of the largest value, whole pixels, degrees and thresholds
        expected = dict.fromkeys(("ShearX", "ShearY"), 0.03 * m)
        expected |= {name: int(m) / 32 for name in ("TranslateX", "TranslateY")}
        expected |= dict.fromkeys(("Contrast", "Color", "Brightness", "Sharpness"), 0.1 + 0.18 * m) | numbers
        expected |= {"Rotate": int(3 * m), "Cutout": int(2 * m) / 32 if m <= 3 else None}
        for name, magnitude in expected.items():
            if magnitude is not None:
                assert converted(scope["from_autoaugment"], name, m) == pytest.approx(magnitude, abs=1e-9), (name, m)
        assert math.ceil(converted(scope["from_autoaugment"], "Solarize", m)) == 256 - int(25.6 * m)
    for m in (0, 1, 2):
        assert int(converted(scope["from_autoaugment"], "Posterize", m)) == 4 - int(0.4 * m)
    for m in (0, 0.2, 0.5, 0.83, 1):  # Fast AutoAugment: low + m (high - low)
        for name, low, high in (
            *((name, -0.3, 0.3) for name in ("ShearX", "ShearY")),
            *((name, -0.45, 0.45) for name in ("TranslateX", "TranslateY")),
            *((name, 0.1, 1.9) for name in ("Contrast", "Color", "Brightness", "Sharpness")),
            *(("Rotate", -30, 30), ("Solarize", 0, 256), ("Posterize", 4, 8), ("Cutout", 0, 0.2)),
        ):
            theirs = low + m * (high - low)
            assert converted(scope["from_fast_autoaugment"], name, m) == pytest.approx(abs(theirs), abs=1e-9), (name, m)


def converted(convert, name, magnitude):
    """The strength that a converted operation has here, without its sign."""
    file = convert([[(name, 0.25, magnitude)]])
    ((((row, level, probability),),),) = [
        [[read_operation(one, file["levels"]) for one in sub] for sub in policy] for policy in file["policies"]
    ]
    assert (OPS[row].name, probability) == (name, 0.25)
    return OPS[row].magnitude(level, file["levels"])


def test_a_model_is_wrapped_for_robustbench_as_shown(train):
    code = example("robustness.md", "torch.hub")
    assert len(code.splitlines()) <= 15
    run = train("wrapped", "mean=[0.4, 0.5, 0.6]", "epochs=1", "eval_every=1")
    scope = {}
    exec(code.replace("logs/wresnet40x2_cifar10_0", str(run)).replace('load("."', f"load({str(ROOT)!r}"), scope)
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    normalise = Normalise(Config(dataset="shapes", image_size=16, mean=(0.4, 0.5, 0.6)), torch.device("cpu"))
    network = build_model("wresnet10_1", 10).eval()
    network.load_state_dict(load_tensors(run / "model.pt")["model"])
    with torch.no_grad():
        expected, ours = network(normalise(images)), scope["model"](images / 255)
    torch.testing.assert_close(ours, expected)


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
