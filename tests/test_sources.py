"""Sources of policies as the settings ask for them, and what they take from files."""

import pytest
import torch
from conftest import same

from config import Config
from policies import ControllerPolicies, PolicySource, RandomPolicies
from sources import build_policies


def test_the_controllers_start_depends_on_its_seed_alone():
    torch.manual_seed(1)
    a = build_policies(Config(seed=7)).state_dict()
    torch.manual_seed(2)
    torch.rand(3)
    state = torch.get_rng_state()
    b = build_policies(Config(seed=7)).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "others' draws must not be disturbed"
    assert same(a["controller"], b["controller"])
    assert not same(a["controller"], build_policies(Config(seed=8)).state_dict()["controller"])


@pytest.mark.parametrize(
    ("policy", "kind"), [("controller", ControllerPolicies), ("random", RandomPolicies), ("none", PolicySource)]
)
def test_sources_by_name(policy, kind):
    assert type(build_policies(Config(policy=policy))) is kind
