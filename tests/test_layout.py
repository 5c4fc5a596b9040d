"""The layout: which module may import which, how long files and functions are, and names and pages that stay short."""

import ast
import functools
import sys

import pytest
from conftest import ROOT

SCRIPTS = ("main", "evaluate", "experiments", "report", "hubconf")
BASE = ("models", "augmentations", "controller", "utils")
SIDES = ("analysis", "evaluation", "training")
# A module imports from lower layers only; within a layer, only what PEERS lists.
LAYERS = (BASE, ("config",), ("datasets", "policies"), ("dataloader",), SIDES, SCRIPTS)
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer}
PEERS = {"analysis": {"evaluation", "training"}, "evaluation": {"training"}, "controller": {"augmentations"}}
SHARED_BY_EVALUATION = {f"training.{name}" for name in ("distributed", "lock", "log", "signals", "exit")}
# For these, the only modules from outside the standard library.
OUTSIDE = {"augmentations": {"torch"}, "controller": {"torch", "augmentations"}, "models": {"torch", "torchvision"}}
LONGEST_FILE, MOST_FILES = 520, 11
SOURCES = sorted(path for name in LAYER for path in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/**/*.py")])


def lines_in(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def module(path):
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path):
    """The full names of all modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module(path)}: relative import on line {node.lineno}; write the full name"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else node.module for name in full}
    return found


def broken_rule(importer, imported):
    """Why `importer` may not import `imported`, or None if it may. Both are full module names."""
    own, other = importer.split(".")[0], imported.split(".")[0]
    if own in OUTSIDE and other not in (OUTSIDE[own] | {own}) and other not in sys.stdlib_module_names:
        return f"{own} imports {', '.join(sorted(OUTSIDE[own]))} and the standard library only"
    if other not in LAYER or other == own:
        return None
    if other in SCRIPTS:
        return "nothing imports a script"
    if own == "evaluation" and other == "training" and imported not in SHARED_BY_EVALUATION:
        return f"evaluation imports only {', '.join(sorted(SHARED_BY_EVALUATION))} of training"
    if LAYER[other] >= LAYER[own] and other not in PEERS.get(own, ()):
        return f"{own} imports only lower layers{' and ' if own in PEERS else ''}{', '.join(PEERS.get(own, ()))}"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_imports_follow_the_layers(path):
    broken = {f"{module(path)} imports {name}": broken_rule(module(path), name) for name in sorted(imports(path))}
    broken = [f"{what}: {rule}" for what, rule in broken.items() if rule]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("importer", "imported", "words"),
    [
        ("main", "evaluate", "nothing imports a script"),
        ("training.manager", "evaluation.predict", "training imports only lower layers"),
        ("training.manager", "analysis.figures", "training imports only lower layers"),
        ("evaluation.predict", "training.state", "of training"),
        ("datasets.loading", "policies.files", "datasets imports only lower layers"),
        ("config", "dataloader", "config imports only lower layers"),
        ("utils", "config", "utils imports only lower layers"),
        ("augmentations", "numpy", "augmentations imports torch and"),
        ("models.resnet", "utils", "models imports torch, torchvision and"),
        ("main", "evaluation.predict", None),
        ("evaluation.predict", "training.distributed", None),
        ("analysis.summaries", "evaluation.results", None),
        ("models.resnet", "models.noise", None),
        ("controller", "math", None),
    ],
)
def test_the_rules_name_what_they_forbid(importer, imported, words):
    rule = broken_rule(importer, imported)
    assert rule is None if words is None else words in rule


def test_every_module_has_a_layer():
    assert len(list(ROOT.glob("*.py"))) == 10, "nine Python files at the top, and the one that torch.hub needs"
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    stems = {path.stem for path in ROOT.glob("*.py")} | packages
    assert stems == LAYER.keys(), f"without a layer, or gone: {stems ^ LAYER.keys()}"


def python_files():
    ours = (*LAYER, "tests", "benchmarks")
    return sorted([*ROOT.glob("*.py"), *(path for name in ours for path in (ROOT / name).rglob("*.py"))])


def test_no_folder_has_more_than_eleven_python_files():
    folders = {path.parent for path in python_files()}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert not {name: count for name, count in counts.items() if count > MOST_FILES}


def test_no_python_file_is_long():
    counts = {str(path.relative_to(ROOT)): lines_in(path) for path in python_files()}
    del counts["augmentations.py"]
    assert not {name: count for name, count in counts.items() if count > LONGEST_FILE}


def test_main_is_short():
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree(ROOT / "main.py")) if isinstance(node, functions)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in found}
    assert not {name: length for name, length in lengths.items() if length > 50}
    assert lines_in(ROOT / "main.py") <= 260


def test_names_of_tests_are_short():
    names = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and len(node.name.removeprefix("test_")) > 60
    ]
    assert not names, "\n".join(names)


def test_the_readme_is_short():
    assert lines_in(ROOT / "README.md") <= 180
