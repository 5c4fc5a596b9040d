"""Networks: parameter totals, shapes, and what may not be asked for."""

import pytest
import torch

from models import build_model, check_model


@pytest.mark.parametrize(
    ("name", "classes", "total"),
    [
        ("wresnet28_10", 10, 36_479_194),
        ("wresnet28_10", 100, 36_536_884),
        ("wresnet40_2", 10, 2_243_546),
        ("wresnet40_2", 100, 2_255_156),
    ],
)
def test_parameter_totals_are_the_published_ones(name, classes, total):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(name, classes).parameters()) == total


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 64)])
def test_any_image_size(size):
    model = build_model("wresnet10_1", 7)
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


def test_initial_convolutions_have_msra_variance():
    torch.manual_seed(0)
    for name, parameter in build_model("wresnet16_4", 10).named_parameters():
        if parameter.ndim == 4 and parameter.numel() > 10_000:
            fan_in = parameter[0].numel()
            assert parameter.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05), name


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x = build_model("wresnet10_1", 10, dropout=0.5), torch.randn(4, 3, 32, 32)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wresnet", "unknown model 'wresnet'; there are wresnet<depth>_<width>"),
        ("resnet9000", "unknown model"),
        ("wresnet29_10", r"6n \+ 4 .* not 29"),
        ("wresnet4_1", r"6n \+ 4 .* not 4"),
        ("wresnet28_0", "1 to 1000, not 0"),
    ],
)
def test_unknown_names_are_refused(name, message):
    for build in (lambda: build_model(name, 10), lambda: check_model(name)):
        with pytest.raises(ValueError, match=message):
            build()
