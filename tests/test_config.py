"""Settings: where they come from, and messages for what is refused."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from augmentations import OPS
from benchmarks.cost import GPU, PEAK, SHARE, cost, describe, published_confs
from config import (
    DEFAULT_CONF,
    PAPER_OPS,
    Config,
    ConfigError,
    add_setting_arguments,
    find_conf,
    load_config,
    parse_overrides,
    to_yaml,
    warn_of_settings,
)
from main import learning_rate
from models import build_model, check_model
from utils import CommandLine, UserError

CONFS = sorted(path for path in (ROOT / "confs").rglob("*.yaml") if path.parent.name != "experiments")

# The published settings: data set, network, N, lr, weight decay, schedule, epochs.
PUBLISHED = {
    "wresnet28x10_cifar10": ("cifar10", "wresnet28_10", 128, 0.1, 5e-4, "step", 200),
    "wresnet40x2_cifar10": ("cifar10", "wresnet40_2", 128, 0.1, 5e-4, "cosine", 200),
    "shake26_2x32d_cifar10": ("cifar10", "shakeshake26_2x32d", 128, 0.2, 1e-4, "cosine", 600),
    "shake26_2x96d_cifar10": ("cifar10", "shakeshake26_2x96d", 128, 0.2, 1e-4, "cosine", 600),
    "shake26_2x112d_cifar10": ("cifar10", "shakeshake26_2x112d", 128, 0.2, 1e-4, "cosine", 600),
    "pyramid272_cifar10": ("cifar10", "pyramid272_200", 128, 0.1, 1e-4, "cosine", 600),
    "wresnet28x10_cifar100": ("cifar100", "wresnet28_10", 128, 0.1, 5e-4, "step", 200),
    "shake26_2x96d_cifar100": ("cifar100", "shakeshake26_2x96d", 128, 0.1, 5e-4, "cosine", 1200),
    "pyramid272_cifar100": ("cifar100", "pyramid272_200", 128, 0.5, 1e-4, "cosine", 1200),
    "resnet50": ("imagenet", "resnet50", 2048, 0.8, 1e-4, "cosine", 120),
    "resnet50d": ("imagenet", "resnet50d", 2048, 0.8, 1e-4, "cosine", 120),
    "resnet200": ("imagenet", "resnet200", 2048, 0.8, 1e-4, "cosine", 120),
}
# The confs of AugMix's CIFAR-10-C table: network, epochs and weight decay of its authors' code.
AUGMIX = {
    "augmix_wresnet40x2_cifar10": ("wresnet40_2", 100, 5e-4),
    "augmix_allconv_cifar10": ("allconv", 100, 5e-4),
    "augmix_resnext29_cifar10": ("resnext29_4x32d", 200, 5e-4),
    "augmix_densenet100_cifar10": ("densenet100_12", 200, 1e-4),
}
TRANSFER = ("wresnet28x10_cifar10", "wresnet28x10_cifar100", "resnet50d", "resnet200")
PUBLISHED |= {f"{name}_transfer": PUBLISHED[name] for name in TRANSFER}
# The published test errors (top-1, and top-5 for ImageNet) of the paper, and of a re-implementation.
ERRORS = {
    "wresnet28x10_cifar10": ("1.90 +- 0.15", "2.35"),
    "shake26_2x32d_cifar10": ("2.36 +- 0.10", "2.51"),
    "shake26_2x96d_cifar10": ("1.85 +- 0.12", "2.43"),
    "shake26_2x112d_cifar10": ("1.78 +- 0.05",),
    "pyramid272_cifar10": ("1.36 +- 0.06",),
    "wresnet28x10_cifar100": ("15.49 +- 0.18",),
    "shake26_2x96d_cifar100": ("14.10 +- 0.15",),
    "pyramid272_cifar100": ("10.42 +- 0.20",),
    "resnet50": ("20.60 +- 0.15", "5.53 +- 0.05"),
    "resnet50d": ("20.00 +- 0.12", "5.25 +- 0.03"),
    "resnet200": ("18.68 +- 0.18", "4.70 +- 0.05"),
    "wresnet28x10_cifar10_transfer": ("2.45 +- 0.13",),
    "wresnet28x10_cifar100_transfer": ("16.48 +- 0.15",),
    "resnet50d_transfer": ("20.20 +- 0.05",),
    "resnet200_transfer": ("19.05 +- 0.10",),
}


@pytest.fixture
def conf(tmp_path):
    """Write a conf file: conf("lr: 0.1") -> its path."""

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("path", CONFS, ids=lambda path: path.stem)
def test_every_conf_loads_and_its_network_exists(path):
    config = load_config(path, {})
    check_model(config.model, **config.model_options())
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    command = "python main.py" if path == ROOT / DEFAULT_CONF else f"--load_conf {path.relative_to(ROOT).as_posix()}"
    assert command in text


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFS, ids=lambda path: path.stem)
def test_the_network_of_every_conf_takes_a_step(path):
    config = load_config(path, {})
    torch.manual_seed(0)
    model = build_model(config.model, 10, **config.model_options())
    side = 64 if config.dataset == "imagenet" else config.image_size
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(torch.randn(2, 3, side, side)), torch.arange(2)).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    # BatchNorm takes away what the biases before it add: they have no gradient, up to rounding.
    biases = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    for (key, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert parameter.isfinite().all(), key
        assert key in biases or not torch.equal(parameter, old), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_confs_are_the_published_settings(name):
    (path,) = (path for path in CONFS if path.stem == name)
    c = load_config(path, {})
    assert (c.dataset, c.model, c.batch_size, c.lr, c.weight_decay, c.schedule, c.epochs) == PUBLISHED[name]
    transfer = name.endswith("_transfer")
    source = ("frozen", "./logs/resnet50_0") if transfer else ("controller", None)
    assert (c.policy, c.policy_from) == source
    assert (c.M, c.Q, c.K, c.levels, len(c.ops), c.policy_interval) == (8, 5, 2, 10, 16, None)
    assert (c.reward, c.reward_ema, c.divide_by_std, c.logit_bound, c.clean_share) == ("loss", 0, True, 0, 0)
    assert c.optimizer == "sgd"
    assert (c.controller_lr, c.entropy_bonus, c.momentum, c.nesterov, c.flip) == (0.00035, 0.00001, 0.9, True, True)
    small, large = (32, 4, 16, True), (224, 0, 0, True)
    assert (c.image_size, c.crop_padding, c.cutout, c.crop_per_copy) == (large if c.dataset == "imagenet" else small)
    assert (c.gamma, c.label_smoothing, c.grad_clip, c.warmup_epochs, c.dropout) == (0.2, 0, 0, 0, 0)
    if c.schedule == "step":
        rates = [learning_rate(c, epoch, 1) for epoch in range(200)]
        assert rates == pytest.approx([0.1] * 60 + [0.02] * 60 + [0.004] * 40 + [0.0008] * 40)


def test_there_is_one_conf_for_every_published_cell():
    assert {path.stem for path in published_confs()} == PUBLISHED.keys() | AUGMIX.keys()
    assert {path.stem for path in CONFS} == PUBLISHED.keys() | AUGMIX.keys() | {"demo", "folder"}


@pytest.mark.parametrize("name", AUGMIX)
def test_the_confs_of_augmix_are_the_published_recipes(name):
    c = load_config(ROOT / "confs" / "cifar10" / f"{name}.yaml", {})
    assert (c.model, c.epochs, c.weight_decay) == AUGMIX[name]
    assert (c.dataset, c.policy, c.jsd, c.M, c.batch_size) == ("cifar10", "augmix", 12, 3, 128)
    assert (c.lr, c.momentum, c.nesterov, c.schedule, c.warmup_epochs) == (0.1, 0.9, True, "cosine", 0)
    assert not c.crop_per_copy, "the copies that are compared have one crop and flip"
    assert (c.mean, c.std, c.flip, c.crop_padding, c.cutout, c.dropout) == ((0.5,) * 3, (0.5,) * 3, True, 4, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("path", published_confs(), ids=lambda path: path.stem)
def test_published_confs_open_with_errors_command_and_cost(path):
    header = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    numbers = re.findall(r"(\d+\.\d+(?: \+- \d+\.\d+)?) %", header.split("# Cost")[0])
    assert tuple(numbers) == ERRORS.get(path.stem, ())
    assert f"--load_conf confs/{path.relative_to(ROOT / 'confs').as_posix()} " in header
    config = load_config(path, {})
    assert f"--M {config.M} --seed 0 --amp\n" in header
    assert f"Cost: about {describe(cost(config).gpu_hours)} GPU-hours (A100 at 20 % of its peak" in header
    assert (GPU, PEAK, SHARE) == ("A100", 312e12, 0.2)
    assert config.batch_size % config.accumulate == 0


@pytest.mark.parametrize(("name", "multiply_adds"), [("resnet50", 4.09e9), ("wresnet28x10_cifar10", 5.24e9)])
def test_operations_are_counted_as_published(name, multiply_adds):
    """A forward pass as published (torchvision's model card; the wide ResNets' own page); backward about twice that."""
    (path,) = (path for path in CONFS if path.stem == name)
    assert cost(load_config(path, {})).flops_per_image == pytest.approx(3 * 2 * multiply_adds, rel=0.02)


def test_command_line_over_conf_file_over_default(conf):
    config = load_config(conf("lr: 0.3\nepochs: 7"), {"epochs": ("--set", 9)})
    assert (config.lr, config.epochs, config.momentum) == (0.3, 9, 0.9)


def test_numbers_that_yaml_reads_as_texts_are_numbers(conf):
    config = load_config(conf("weight_decay: 5e-4\nlr: 1e-1\nM: '4'\nmomentum: 0"), {"nesterov": ("--set", False)})
    assert (config.weight_decay, config.lr, config.M, config.momentum) == (5e-4, 0.1, 4, 0.0)


@pytest.mark.parametrize("config", [Config(), Config(ops=("Rotate", "Invert"), train_size=5, mean=(0.1, 0.2, 0.3))])
def test_a_written_config_reads_back_equal(conf, config):
    assert load_config(conf(to_yaml(config)), {}) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["unknown setting 'epoch'", "did you mean epochs?"]),
        ("lr: abc", ["lr: 'abc' is not a number"]),
        ("lr: .nan", ["lr: nan is not finite"]),
        ("lr: true", ["lr: True is not a number"]),
        ("lr: 0", ["lr: 0.0 must be above 0"]),
        ("M: 2.5", ["M: 2.5 is not a whole number"]),
        ("train_size: 0", ["train_size: 0 must be at least 1, or null"]),
        ("flip: 1", ["flip: 1 is not true or false"]),
        ("model: vgg16", ["model: unknown model 'vgg16'", "wresnet<depth>_<width>"]),
        ("model: resnet50\ndropout: 0.1", ["model: resnet50 has no option 'dropout'"]),
        ("eval_view: [224]", ["eval_view: (224,) must be two numbers"]),
        ("eval_view: [224, 256]", ["eval_view: (224, 256) must be two numbers", "the second not the larger"]),
        ("dataset: imagenet", ["crop_padding: 4 is for small images", "set it to 0"]),
        ("model: wresnet27_10", ["model: ", "6n + 4"]),
        ("model: 3", ["model: 3 is not a text"]),
        ("dataset: cifar11", ["dataset: 'cifar11' is not one of shapes, cifar10, cifar100, imagenet, folder"]),
        ("ops: []", ["ops: () must name at least one operation"]),
        ("ops: [Rotate, Rotate]", ["names an operation twice"]),
        ("ops: Rotate", ["ops: 'Rotate' is not a list; write ops: [Rotate]"]),
        ("ops: [rotate]", ["unknown operation 'rotate'", "did you mean Rotate?"]),
        ("schedule: step", ["schedule: 'step' needs milestones"]),
        ("schedule: step\nmilestones: [60, 20]", ["milestones: (60, 20) must rise and lie between 0 and epochs (200)"]),
        (
            "milestones: [60, 200]",
            ["milestones", "between 0 and epochs (200)", "--set epochs=200 schedule=cosine milestones=[]"],
        ),
        ("mean: [0.5]", ["mean: (0.5,) must be three numbers"]),
        ("std: []", ["std: () must be three numbers"]),
        ("std: [0, 1, 1]", ["std: (0.0, 1.0, 1.0) must be above 0"]),
        ("warmup_epochs: 500", ["warmup_epochs: 500.0 must be below epochs (200)"]),
        ("dataset: shapes\nimage_size: 100", ["image_size: 100 is too large for shapes"]),
        ("entropy_floor: 1.5", ["entropy_floor: 1.5 is not between 0 and 1"]),
        ("entropy_floor: -1", ["entropy_floor: -1.0 must be at least 0"]),
        ("policy: random\nentropy_floor: 0.9", ["entropy_floor: 0.9 needs policies that learn", "not random"]),
        ("policy: none\nentropy_floor_end: 0.5", ["entropy_floor_end: 0.5 needs policies that learn"]),
        ("M: 4\nkeep: 5", ["keep: 5 is more than the M = 4 copies"]),
        ("keep: 0", ["keep: 0 must be at least 1, or null"]),
        ("keep: 2\npolicy: augmix\njsd: 12\ncrop_per_copy: false", ["keep: 2 does not go with jsd"]),
        ("keep: 2\nkeep_by: margin", ["keep_by: 'margin' needs a teacher", "set reward: teacher"]),
        ("ema: 1", ["ema: 1.0 is not between 0 and 0.9999999"]),
        ("mixup: 0.2\njsd: 12\npolicy: augmix\ncrop_per_copy: false", ["mixup: 0.2 does not go with jsd"]),
        ("cutmix: 1\njsd: 12\npolicy: augmix\ncrop_per_copy: false", ["cutmix: 1.0 does not go with jsd"]),
        ("cutmix: -1", ["cutmix: -1.0 must be at least 0"]),
        ("keep_by: hardest", ["keep_by: 'hardest' is not one of loss, weighted, random, margin"]),
        ("reward_loss: hinge", ["reward_loss: 'hinge' is not one of cross_entropy, nonsaturating"]),
        ("- a list", ["a conf file holds lines of the form 'setting: value'"]),
        ("lr: [0.1", ["line 1: is not YAML"]),
        ("1: 2", ["unknown setting 1"]),
        ("lr: 2020-13-45", ["is not YAML"]),
        ("lr: " + "1" * 5000, ["is not YAML"]),
        ("[" * 3000, ["is not YAML"]),
        ("epochs: " + "9" * 30, ["epochs", "is larger than 1e9"]),
        ("M: 99999999", ["M: 99999999 is not between 1 and 10000"]),
        ("seed: 9223372036854775808", ["seed: 9223372036854775808 is not between 0 and 9223372036854775807"]),
        ("lr: 1e308", ["lr: 1e+308 is larger than 1e9"]),
        ("std: [1e-300, 1, 1]", ["std: (1e-300, 1.0, 1.0) must be above 0"]),
    ],
)
def test_bad_settings_are_named_with_their_file(conf, text, words):
    path = conf(text)
    with pytest.raises(UserError) as error:
        load_config(path, {})
    message = str(error.value)
    assert message.startswith(str(path))
    assert all(word in message for word in words), message
    assert message.count("\n") <= 1


RANGES = [
    (field, rule, bound, beyond)
    for field in dataclasses.fields(Config)
    for rule, beyond in (("low", -1), ("high", 1), ("above", 0))
    if (bound := field.metadata[rule]) is not None
]
CHOICES = [field for field in dataclasses.fields(Config) if field.metadata["choices"]]


@pytest.mark.parametrize(("field", "rule", "bound", "beyond"), RANGES, ids=lambda v: getattr(v, "name", str(v)))
def test_numbers_out_of_range_are_refused(field, rule, bound, beyond):
    with pytest.raises(ConfigError, match=rf"^{field.name}: {bound + beyond} (must be|is not between) .*{bound}"):
        Config(**{field.name: bound + beyond})


@pytest.mark.parametrize("field", CHOICES, ids=lambda field: field.name)
def test_other_values_than_the_choices_are_refused(field):
    with pytest.raises(ConfigError, match=f"^{field.name}: 'x' is not one of {', '.join(field.metadata['choices'])}$"):
        Config(**{field.name: "x"})


def test_help_names_ranges_and_choices():
    parser = CommandLine()
    add_setting_arguments(parser)
    for words in ("lr = 0.1", "[above 0]", "[0 to 0.999]", "[at least 1]", "[policy, subpolicy]"):
        assert words in parser.format_help()


def test_a_new_operation_changes_no_default():
    assert Config().ops == PAPER_OPS == tuple(op.name for op in OPS[:16])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), []),
        (("cutout=16",), ["cutout: 16 of 16 pixels blank most of an image; set it to 8 or less"]),
        (("crop_padding=8",), ["crop_padding: 8 of 16 pixels can shift half an image out of view; set it to 2"]),
        (("dataset=cifar100",), ["no --load_conf: all other settings are those of confs/demo.yaml (wresnet10_1,"]),
    ],
)
def test_probable_mistakes_give_warnings(capsys, settings, words):
    args = argparse.Namespace(load_conf=None, set=settings)
    warn_of_settings(load_config(DEFAULT_CONF, parse_overrides(settings)), args)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(words)
    assert all(line.startswith(f"warning: {start}") for line, start in zip(lines, words, strict=True))


def test_a_conf_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_conf("confs/folder.yaml") == ROOT / "confs" / "folder.yaml"
    (tmp_path / "confs").mkdir()
    (tmp_path / "confs" / "folder.yaml").write_text("")
    assert find_conf("confs/folder.yaml") == Path("confs/folder.yaml"), "the working directory comes first"
    assert find_conf("none.yaml") == Path("none.yaml")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--lr", "0.05"], "--lr: lr is a setting: --set lr=0.05"),
        (["--epochs=10"], "--epochs: epochs is a setting: --set epochs=10"),
        (["--batch-size", "64"], "--batch-size: batch_size is a setting: --set batch_size=64"),
        (["--epoch", "10"], "unknown argument --epoch; did you mean epochs?"),
    ],
)
def test_a_setting_given_as_a_flag_is_answered_with_set(words, answer):
    parser = CommandLine(prog="main.py")
    add_setting_arguments(parser)
    with pytest.raises(UserError, match=f"^{answer}"):
        parser.parse_args(words)


def test_the_command_line_replaces_a_confs_floor_as_a_whole(conf):
    path = conf("entropy_floor: 0.9\nentropy_floor_end: 0.8\nM: 3")
    assert load_config(path, {}).entropy_floor == 0.9
    assert load_config(path, {"policy": ("--set", "controller")}).entropy_floor == 0.9
    changed = load_config(path, {"policy": ("--set", "random")})
    assert (changed.entropy_floor, changed.entropy_floor_end, changed.M) == (0.0, None, 3)
    changed = load_config(path, {"entropy_floor": ("--set", 0.5)})
    assert (changed.entropy_floor, changed.entropy_floor_end) == (0.5, None)
    with pytest.raises(UserError, match=r"--set: entropy_floor: 0\.9 needs policies that learn"):
        load_config(path, {"policy": ("--set", "random"), "entropy_floor": ("--set", 0.9)})


def test_a_bad_value_is_blamed_on_the_command_line(conf):
    with pytest.raises(UserError, match=r"^--M: M: '0x' is not a whole number$"):
        load_config(conf("M: 4"), {"M": ("--M", "0x")})
    with pytest.raises(UserError, match=r"^--set: milestones: .* must rise"):
        load_config(conf("epochs: 4"), {"milestones": ("--set", [3, 2])})


def test_missing_and_unreadable_confs(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml: there is no such conf file"):
        load_config(Path("nowhere.yaml"), {})
    with pytest.raises(UserError, match="cannot be read as a conf file"):
        load_config(tmp_path, {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="cannot be read as a conf file"):
        load_config(tmp_path / "binary.yaml", {})
