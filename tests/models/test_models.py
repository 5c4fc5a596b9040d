"""Networks: parameter totals, formulas and noise against their definitions, and what may not be asked for."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT

from models import FAMILIES, build_model, check_model
from models.noise import scale_apart, uniform_per_image
from models.pyramidnet import PyramidBottleneck, ShakeDrop
from models.shakeshake import ShakeBlock, TwoPathShortcut

SMALL = ("wresnet10_1", "shakeshake8_2x4d", "pyramid20_12", "resnet50", "resnet50d", "resnet18", "preactresnet18")
SMALL += ("resnext11_2x4d", "densenet10_4", "allconv")

# Totals for 10, 100 and 1000 classes that the publications, or two independent collections of networks, agree on.
TOTALS = {
    "wresnet28_10": (36_479_194, 36_536_884),
    "wresnet40_2": (2_243_546, 2_255_156),
    "shakeshake26_2x32d": (2_923_162, 2_934_772),
    "shakeshake26_2x64d": (11_653_978, 11_677_108),
    "shakeshake26_2x96d": (26_192_922, 26_227_572),
    "shakeshake26_2x112d": (35_640_442, 35_680_852),
    "pyramid272_200": (26_210_842, 26_288_692),
    "pyramid164_270": (27_216_021, 27_319_071),
    "resnet50": (23_528_522, 23_712_932, 25_557_032),
    "resnet50d": (23_547_754, 23_732_164, 25_576_264),
    "resnet200": (62_645_322, 62_829_732, 64_673_832),
    "preactresnet18": (11_172_170,),  # 11,171,146 without the last BatchNorm, which RobustBench's has
    "densenet100_12": (769_162, 800_032),
}


def count(name, classes, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(name, classes, **options).parameters())


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_totals_are_the_published_ones(name):
    for classes, total in zip((10, 100, 1000), TOTALS[name], strict=False):
        assert count(name, classes) == total


def test_pyramids_may_be_described_by_options():
    assert count("pyramid", 10) == count("pyramid", 10, depth=272, alpha=200, bottleneck=True) == 26_210_842
    assert count("pyramid", 10, depth=110, alpha=270, bottleneck=False) == 28_485_477


@pytest.mark.parametrize("size", [(32, 32), (33, 40), (64, 64)])
@pytest.mark.parametrize("name", SMALL)
def test_any_image_size(name, size):
    model = build_model(name, 7)
    assert model(torch.randn(2, 3, *size)).shape == (2, 7)


def test_first_activation_is_shared_with_the_shortcut():
    """Where channels change, block(x) = shortcut(relu(bn(x))) + residual(relu(bn(x))); elsewhere x + residual."""
    torch.manual_seed(0)
    model = build_model("wresnet16_2", 10).eval()
    for group, block, changes in ((0, 0, True), (0, 1, False), (1, 0, True), (2, 1, False)):
        module = model.groups[group][block]
        x = torch.randn(2, module.norm1.num_features, 8, 8)
        activated = torch.relu(module.norm1(x))
        residual = module.conv2(torch.relu(module.norm2(module.conv1(activated))))
        expected = (module.shortcut(activated) if changes else x) + residual
        assert (module.shortcut is not None) is changes
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("name", "fan"), [("wresnet16_4", 1), ("shakeshake8_2x32d", 0), ("pyramid47_80", 0), ("allconv", 0)]
)
def test_initial_convolutions_have_the_published_variance(name, fan):
    """2 / (pixels of the kernel * channels), of the channels in for wide ResNets and of those out for the others."""
    torch.manual_seed(0)
    for key, parameter in build_model(name, 10).named_parameters():
        if parameter.ndim == 4 and parameter.numel() > 8000:
            fan_size = parameter.shape[fan] * parameter[0, 0].numel()
            assert parameter.std().item() == pytest.approx((2 / fan_size) ** 0.5, rel=0.05), key


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x = build_model("wresnet10_1", 10, dropout=0.5), torch.randn(4, 3, 32, 32)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# Noise whose gradient is drawn apart


def test_value_and_gradient_have_separate_factors():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    forward, backward = torch.tensor([[0.5, -2.0, 0.0], [3.0, 0.0, 1.0]], dtype=torch.float64).view(2, 3, 1, 1, 1)
    y = scale_apart(x, forward, backward)
    assert torch.equal(y, forward * x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert torch.equal(x.grad, backward * upstream)


def test_uniform_noise_is_per_image_and_from_the_seed():
    x = torch.zeros(20_000, 3, 1, 1)
    torch.manual_seed(5)
    noise = uniform_per_image(x, -1, 3)
    assert noise.shape == (20_000, 1, 1, 1)
    assert (noise.min() >= -1) & (noise.max() < 3)
    deciles = noise.flatten().quantile(torch.linspace(0.1, 0.9, 9))
    torch.testing.assert_close(deciles, torch.linspace(-0.6, 2.6, 9), atol=0.06, rtol=0)
    torch.manual_seed(5)
    assert torch.equal(uniform_per_image(x, -1, 3), noise)


def two_branches(block, x):
    """The shortcut and both branches of a Shake-Shake block, from its layers by hand."""

    def branch(layers):
        _, conv1, norm1, _, conv2, norm2 = layers
        return norm2(conv2(torch.relu(norm1(conv1(torch.relu(x))))))

    return x if block.shortcut is None else block.shortcut(x), branch(block.branch1), branch(block.branch2)


@pytest.mark.parametrize(("channels_out", "stride"), [(4, 1), (8, 1), (8, 2)])
def test_shake_blocks_follow_their_definition(channels_out, stride):
    torch.manual_seed(0)
    block, x = ShakeBlock(4, channels_out, stride).double(), torch.randn(16, 4, 6, 6, dtype=torch.float64)
    block.eval()
    skip, first, second = two_branches(block, x)
    torch.testing.assert_close(block(x), skip + 0.5 * first + 0.5 * second)

    for module in block.modules():  # noise alone: statistics of the batch would change the branches too
        module.training = isinstance(module, ShakeBlock)
    y = block(x)
    alpha = ((y - skip - second) * (first - second)).sum((1, 2, 3)) / (first - second).square().sum((1, 2, 3))
    mixed = skip + alpha[:, None, None, None] * first + (1 - alpha)[:, None, None, None] * second
    torch.testing.assert_close(y, mixed)
    assert (alpha > 0).all()
    assert (alpha < 1).all()
    assert len(alpha.unique()) == 16, "one alpha per image"


def test_shake_blocks_have_another_beta_in_the_gradient():
    """d y / d branch 1 is beta, d y / d branch 2 is 1 - beta, per image; and beta is not alpha."""
    torch.manual_seed(0)
    block, x = ShakeBlock(4, 4, 1).double(), torch.randn(8, 4, 6, 6, dtype=torch.float64)
    seen = []
    for branch in (block.branch1, block.branch2):
        branch.register_forward_hook(lambda _, __, output: (output.retain_grad(), seen.append(output))[0])
    y = block(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    first, second = seen
    beta = (first.grad / upstream).flatten(1)
    torch.testing.assert_close(beta, beta[:, :1].expand_as(beta))
    torch.testing.assert_close(second.grad, (1 - beta[:, :1, None, None]) * upstream)
    alpha = ((y - x - second) / (first - second)).flatten(1).median(1).values
    assert ((beta > 0) & (beta < 1)).all()
    assert (beta[:, 0] - alpha).abs().min() > 1e-6


def test_the_two_path_shortcut_uses_the_upper_left_neighbour():
    torch.manual_seed(0)
    shortcut, x = TwoPathShortcut(4, 6, 2).eval(), torch.randn(2, 4, 6, 6)
    y = shortcut(x)
    for i, j in ((0, 0), (1, 2), (2, 1)):
        here = torch.relu(x[:, :, 2 * i, 2 * j])
        inside = i > 0 and j > 0
        neighbour = torch.relu(x[:, :, 2 * i - 1, 2 * j - 1]) if inside else torch.zeros_like(here)
        weights = (path.weight[:, :, 0, 0] for path in (shortcut.path1, shortcut.path2))
        expected = torch.cat([pixel @ weight.T for pixel, weight in zip((here, neighbour), weights, strict=True)], 1)
        torch.testing.assert_close(y[:, :, i, j], shortcut.norm(expected[:, :, None, None])[:, :, 0, 0])


def test_shakedrop_follows_its_definition_in_value_and_gradient():
    """Training: 1 for a share p of the images; else alpha in -1..1 forward, beta in 0..1 backward. Evaluation: p."""
    torch.manual_seed(0)
    drop, x = ShakeDrop(0.7), torch.ones(50_000, 1, 1, 1, requires_grad=True)
    y = drop(x)
    y.sum().backward()
    forward, backward = y.detach().flatten(), x.grad.flatten()
    gate = forward == 1
    assert gate.double().mean().item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(backward == 1, gate)
    alpha, beta = forward[~gate], backward[~gate]
    for noise, low, high in ((alpha, -1, 1), (beta, 0, 1)):
        deciles = noise.quantile(torch.linspace(0.1, 0.9, 9))
        torch.testing.assert_close(deciles, low + (high - low) * torch.linspace(0.1, 0.9, 9), atol=0.03, rtol=0)
    assert abs(torch.corrcoef(torch.stack((alpha, beta)))[0, 1]) < 0.03
    assert forward.mean().item() == pytest.approx(0.7, abs=0.01), "E[b + alpha - b alpha] = p"
    drop.eval()
    assert torch.equal(drop(x), 0.7 * x)


def test_pyramid_blocks_follow_their_formula_in_evaluation():
    torch.manual_seed(0)
    model = build_model("pyramid20_12", 10).eval()
    survivals = [block.shakedrop.survival for block in model.blocks]
    assert survivals == pytest.approx([1 - i / 6 * 0.5 for i in range(1, 7)])
    assert [block.channels_out for block in model.blocks] == [4 * (16 + 2 * i) for i in range(1, 7)]
    assert [block.stride for block in model.blocks] == [1, 1, 2, 1, 2, 1]
    x = torch.randn(2, 3, 15, 15)
    expected = model.stem(x)
    for block in model.blocks:
        norm0, conv1, norm1, _, conv2, norm2, _, conv3, norm3 = block.residual
        residual = norm3(conv3(torch.relu(norm2(conv2(torch.relu(norm1(conv1(norm0(expected)))))))))
        skip = F.avg_pool2d(expected, 2, ceil_mode=True) if block.stride == 2 else expected
        missing = residual.shape[1] - skip.shape[1]
        skip = torch.cat((skip, torch.zeros(2, missing, *skip.shape[2:])), 1)
        expected = skip + block.shakedrop.survival * residual
    expected = model.classifier(torch.relu(model.norm(expected)).mean((2, 3)))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(ShakeBlock, (4, 8, 2)), (PyramidBottleneck, (4, 3, 2, 0.6))],
    ids=["ShakeBlock", "ShakeDrop"],
)
def test_the_mean_over_the_noise_is_the_output_in_evaluation(kind, arguments):
    torch.manual_seed(0)
    block, x, draws = kind(*arguments).double().eval(), torch.randn(1, 4, 4, 4, dtype=torch.float64), 20_000
    with torch.no_grad():
        expected = block(x)
        for module in block.modules():
            module.training = isinstance(module, (ShakeBlock, ShakeDrop))
        outputs = block(x.expand(draws, -1, -1, -1))
    standard_error = outputs.std(0) / draws**0.5
    assert standard_error.max() > 0, "there is noise"
    assert ((outputs.mean(0) - expected[0]).abs() <= 4.5 * standard_error + 1e-12).all()


@pytest.mark.parametrize("name", SMALL)
def test_noise_works_with_autocast_and_channels_last(name):
    torch.manual_seed(0)
    model = build_model(name, 10).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_noise_keeps_the_precision_and_layout_of_what_it_scales():
    x = torch.randn(4, 8, 6, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y = ShakeDrop(0.5)(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("shakeshake8_2x4d", "pyramid11_6", "resnet50d")]


@pytest.mark.parametrize("name", ["wresnet10_1", *OTHERS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the compiler's own
def test_networks_compile_into_one_graph(name):
    torch.manual_seed(0)
    model, x = build_model(name, 10), torch.randn(4, 3, 16, 16)
    noisy = name.startswith(("shakeshake", "pyramid"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # raises where the graph breaks
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    model.train()
    first, second = compiled(x), compiled(x)
    assert torch.equal(first, second) is not noisy, "noise is drawn at each call"
    second.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_resnets_have_the_totals_of_torchvisions(depth):
    assert (
        count(f"resnet{depth}", 1000)
        == torchvision.models.get_model_weights(f"resnet{depth}").DEFAULT.meta["num_params"]
    )


def test_allconv_follows_its_definition():
    """Three 3x3 convolutions of 96 and three of 192 channels, a pooling after each three; one unpadded, two 1x1."""
    convolutions = [(3, 96, 9), (96, 96, 9), (96, 96, 9), (96, 192, 9), *[(192, 192, 9)] * 3, *[(192, 192, 1)] * 2]
    total = sum(channels_in * out * pixels + out + 2 * out for channels_in, out, pixels in convolutions)
    assert count("allconv", 10) == total + 192 * 10 + 10
    torch.manual_seed(0)
    model, x = build_model("allconv", 10).eval(), torch.randn(2, 3, 32, 32)
    before = model.features(x)
    assert before.shape == (2, 192, 10, 10)
    torch.testing.assert_close(model(x), model.classifier(F.avg_pool2d(before, 8).flatten(1)))
    torch.testing.assert_close(model.features[2](x), x * torch.sigmoid(1.702 * x))


def test_resnext_follows_its_definition():
    """Bottlenecks of D = C * width channels, doubled in each stage, with C groups; 1x1 shortcuts where it changes."""

    def total(n, C, width, classes):
        stem_and_classifier, channels_in = 27 * 64 + 128 + 1024 * classes + classes, 64
        blocks = 0
        for stage in range(3):
            D, out = C * width * 2**stage, 256 * 2**stage
            for _ in range(n):
                blocks += channels_in * D + D * D * 9 // C + D * out + 4 * D + 2 * out
                blocks += channels_in * out + 2 * out if channels_in != out else 0
                channels_in = out
        return stem_and_classifier + blocks

    assert count("resnext29_4x32d", 10) == total(3, 4, 32, 10)
    assert count("resnext29_8x64d", 10) == total(3, 8, 64, 10) == 34_426_698
    torch.manual_seed(0)
    block = build_model("resnext11_2x4d", 10).eval().stage_2[0]
    x = torch.randn(2, 256, 6, 6)
    inside = torch.relu(block.bn_reduce(F.conv2d(x, block.conv_reduce.weight)))
    halves = zip(inside.chunk(2, 1), block.conv_conv.weight.chunk(2), strict=True)
    grouped = torch.cat([F.conv2d(half, weight, stride=2, padding=1) for half, weight in halves], 1)
    residual = block.bn_expand(block.conv_expand(torch.relu(block.bn(grouped))))
    torch.testing.assert_close(block(x), torch.relu(block.downsample(x) + residual))


def test_preact_blocks_share_the_activation_with_the_shortcut():
    torch.manual_seed(0)
    model = build_model("preactresnet18", 10).eval()
    for block, x in ((model.layer1[0], torch.randn(2, 64, 8, 8)), (model.layer2[0], torch.randn(2, 64, 8, 8))):
        activated = torch.relu(block.bn1(x))
        residual = block.conv2(torch.relu(block.bn2(block.conv1(activated))))
        torch.testing.assert_close(block(x), residual + (block.shortcut(activated) if block.shortcut else x))
    names = {name.partition(".")[0] for name in model.state_dict()}
    assert names == {"conv1", "layer1", "layer2", "layer3", "layer4", "bn", "linear"}, "as in RobustBench"


def test_resnet50_is_torchvisions():
    torch.manual_seed(0)
    theirs, ours = torchvision.models.resnet50().eval(), build_model("resnet50", 1000).eval()
    for buffer in theirs.buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 96, 96)
    assert torch.equal(ours(x), theirs(x))


def test_resnet_d_replaces_stem_and_shortcuts():
    model = build_model("resnet50d", 10)
    assert [tuple(m.weight.shape) for m in model.conv1 if isinstance(m, torch.nn.Conv2d)] == [
        (32, 3, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3)
    ]  # fmt: skip
    x = torch.randn(2, 256, 7, 7)
    pool, conv, norm = model.eval().layer2[0].downsample
    whole = F.pad(x, (0, 1, 0, 1)).unfold(2, 2, 2).unfold(3, 2, 2).sum((4, 5))
    inside = F.pad(torch.ones(7, 7), (0, 1, 0, 1)).unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3))
    torch.testing.assert_close(pool(x), whole / inside)
    assert conv.stride == (1, 1)
    torch.testing.assert_close(model.layer2[0].downsample(x), norm(conv(whole / inside)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wresnet", "unknown model 'wresnet'; there are wresnet<depth>_<width>"),
        ("vgg16", "unknown model 'vgg16'; there are .*, shakeshake<depth>_2x<width>d, pyramid<depth>_<alpha>, resnet"),
        ("resnet9000", "the depth of a ResNet is 18, 34, 50, 101, 152, 200, not 9000"),
        ("resnet18d", "the depth of a ResNet is 50, 101, 152, 200, not 18"),
        ("resnet51d", "the depth of a ResNet is 50, 101, 152, 200, not 51"),
        ("wresnet29_10", r"6n \+ 4 .* not 29"),
        ("wresnet4_1", r"6n \+ 4 .* not 4"),
        ("wresnet28_0", "1 to 1000, not 0"),
        ("shakeshake27_2x32d", r"6n \+ 2 .* not 27"),
        ("shakeshake26_2x31d", "even, 2 to 10000, not 31"),
        ("shakeshake26_2x32", "unknown model"),
        ("pyramid111_200", r"9n \+ 2 .* not 111"),
        ("pyramid272_0", "1 to 10000, not 0"),
        ("preactresnet50", "the depth of a PreAct-ResNet is 18, 34, not 50"),
        ("resnext30_4x32d", r"9n \+ 2 .* not 30"),
        ("resnext29_0x32d", "the cardinality of a ResNeXt is 1 to 1000, not 0"),
        ("densenet101_12", r"6n \+ 4 .* not 101"),
        ("densenet100_0", "the growth of a DenseNet is 1 to 1000, not 0"),
    ],
)
def test_unknown_names_are_refused(name, message):
    for build in (lambda: build_model(name, 10), lambda: check_model(name)):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.slow
def test_checking_a_network_does_not_load_the_compiler():
    """Which would double the time that a command takes to start."""
    code = "import sys, models; models.check_model('wresnet28_10'); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout == b"False\n"


def test_options_that_a_network_does_not_have_are_refused():
    with pytest.raises(ValueError, match="shakeshake26_2x32d has no option 'dropout'"):
        build_model("shakeshake26_2x32d", 10, dropout=0.3)
    with pytest.raises(ValueError, match="wresnet28_10 has no option 'width'"):
        build_model("wresnet28_10", 10, width=3)


def test_every_form_in_the_messages_can_be_built():
    for family in FAMILIES:
        depths = {"wresnet": "16", "resnet": "50", "preactresnet": "18", "densenet": "16"}
        name = family.form.replace("<depth>", depths.get(family.form.partition("<")[0], "20"))
        for number in ("<width>", "<alpha>", "<cardinality>", "<growth>"):
            name = name.replace(number, "2")
        check_model(name)
