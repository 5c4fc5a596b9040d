"""Sources of policies from settings, and files of policies."""

import json

import pytest
import torch
import yaml
from conftest import LITTLE, TINY, assert_refused, files, final_state, lines, little_network, same

import main
import policies.recorded as recorded
from augmentations import row_of
from config import Config
from policies import build_policies
from policies.learned import ControllerPolicies, FrozenPolicies, read_controller
from policies.recorded import RecordedPolicies, read_policies
from policies.sources import PolicySource, RandomPolicies
from utils import UserError, load_tensors

POLICIES = [
    [[["Rotate", 3], ["Invert", 0]], [["Solarize", 2]]],
    [[["ShearX", 9]], [["Cutout", 4], ["Equalize", 0]]],
]


@pytest.fixture
def policy_file(tmp_path):
    """policy_file("name.json", content) -> its path; text is written as it is, all else as the suffix says."""

    def write(name, content):
        path = tmp_path / name
        dump = json.dumps if path.suffix == ".json" else yaml.safe_dump
        path.write_text(content if isinstance(content, str) else dump(content), encoding="utf-8")
        return path

    return write


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_controllers_start_depends_on_its_seed_alone():
    torch.manual_seed(1)
    a = build_policies(Config(seed=7)).state_dict()
    torch.manual_seed(2)
    torch.rand(3)
    state = torch.get_rng_state()
    b = build_policies(Config(seed=7)).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the default generator is unchanged"
    assert same(a["controller"], b["controller"])
    assert not same(a["controller"], build_policies(Config(seed=8)).state_dict()["controller"])


def test_sources_by_name(policy_file):
    file = str(policy_file("mine.json", POLICIES))
    kinds = {"controller": ControllerPolicies, "random": RandomPolicies, "none": PolicySource}
    for policy, kind in kinds.items():
        assert type(build_policies(Config(policy=policy))) is kind
    assert type(build_policies(Config(policy="recorded", policy_from=file))) is RecordedPolicies


def test_every_setting_reaches_the_source():
    signals = {"reward": "teacher", "teacher_weight": 0.3, "reward_ema": 0.9, "divide_by_std": False}
    floors = {"entropy_floor": 0.9, "entropy_floor_end": 0.5}
    learning = {"logit_bound": 2.5, "entropy_bonus": 0.1, "controller_lr": 0.7} | floors
    source = build_policies(Config(clean_share=0.2, **learning, **signals))
    assert source.entropy_floors == (0.9, 0.5)
    assert build_policies(Config(entropy_floor=0.9)).entropy_floors == (0.9, 0.9)
    assert source.reward == (0.3, 0.9, False)
    assert (source.controller.logit_bound, source.clean_share, source.entropy_bonus) == (2.5, 0.2, 0.1)
    assert source.optimizer.param_groups[0]["lr"] == 0.7
    plain = build_policies(Config())
    assert (*plain.reward, plain.clean_share, plain.controller.logit_bound) == (0.0, 0.0, True, 0.0, 0.0)


@pytest.mark.parametrize("form", ["list.json", "list.yaml", "mapping.yaml", "line.jsonl"])
def test_policies_are_read_from_every_form(policy_file, form):
    content = POLICIES if form.startswith("list") else {"policies": POLICIES, "levels": 10, "losses": [1, 2]}
    recorded = read_policies(policy_file(form, json.dumps(content) if form.endswith("jsonl") else content))
    nothing = -1
    names = ["Rotate", "Invert", "Solarize", "ShearX", "Cutout", "Equalize"]
    a, b, c, d, e, f = map(row_of, names)
    assert recorded.op_RPQK.tolist() == [[[[a, b], [c, nothing]], [[d, nothing], [e, f]]]]
    assert recorded.level_RPQK.tolist() == [[[[3, 0], [2, 0]], [[9, 0], [4, 0]]]]
    assert recorded.levels == 10


def test_policies_written_by_hand_are_applied(policy_file):
    source = build_policies(Config(policy="recorded", policy_from=str(policy_file("mine.yaml", POLICIES)), M=2))
    source.resample(generator())
    assert source.by_name() == [[[tuple(op) for op in sub] for sub in policy] for policy in POLICIES]
    assert source.descriptions()[0] == "Rotate ±10 then Invert or Solarize 56.9"
    plan = source.plan(500, (32, 32), generator(1))
    first = plan.op_BK[0::2]
    assert {tuple(ops) for ops in first.tolist()} == {
        (row_of("Rotate"), row_of("Invert")),
        (row_of("Solarize"), -1),
    }


def test_fractional_levels_and_probabilities_are_applied(policy_file):
    levels, content = 11, [[[["Solarize", 2.5, 0.25], ["Color", 10]], [["Invert", 0, 0]]]]
    file = policy_file("published.json", {"policies": content, "levels": levels})
    source = build_policies(Config(policy="recorded", policy_from=str(file), M=1))
    source.resample(generator())
    assert source.by_name() == [[[("Solarize", 2.5, 0.25), ("Color", 10.0)], [("Invert", 0.0, 0.0)]]]
    assert source.descriptions() == ["Solarize 64 (25%) then Color 1.9 or Invert (0%)"]
    plan = source.plan(4000, (8, 8), generator(1))
    first_B = (plan.op_BK == row_of("Color"))[:, 1]
    solarized_B = (plan.op_BK == row_of("Solarize"))[:, 0]
    assert first_B.double().mean() == pytest.approx(0.5, abs=0.05)
    assert solarized_B[first_B].double().mean() == pytest.approx(0.25, abs=0.04)
    assert set(plan.magnitude_BK[solarized_B, 0].tolist()) == {2.5 / 10 * 256}
    assert (plan.op_BK[~first_B] == -1).all()
    other = build_policies(Config(policy="recorded", policy_from=str(file), M=1))
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.plan(50, (8, 8), generator(2)).op_BK, source.plan(50, (8, 8), generator(2)).op_BK)


BAD = {
    "no list": ({"policies": 5}, "5 is no list of policies"),
    "empty": ([], "is no list of policies"),
    "nothing": ("", "holds no policies"),
    "no subpolicies": ([[]], "policy 1: [] is no list of sub-policies"),
    "no pairs": ([[["Rotate", 3]]], "sub-policy 1: 'Rotate' is not [operation, level] or [operation, level, prob"),
    "unknown": ([[[["Rotat", 3]]]], "policy 1, sub-policy 1: 'Rotat' is no operation; did you mean Rotate?"),
    "no name": ([[[[["Rotate"], 3]]]], "is no operation"),
    "level": ([[[["Rotate", 10]]]], "10 is no level: 0 to 9"),
    "negative": ([[[["Rotate", -1]]]], "-1 is no level"),
    "beyond": ([[[["Rotate", 9.1]]]], "9.1 is no level: 0 to 9"),
    "no number": ([[[["Rotate", float("nan")]]]], "nan is no level"),
    "probability": ([[[["Rotate", 1, 1.2]]]], "policy 1, sub-policy 1: 1.2 is no probability: 0 to 1"),
    "text": ([[[["Rotate", 1, "0.5x"]]]], "'0.5x' is no probability: 0 to 1"),
    "too much": ([[[["Rotate", 1, 1, 1]]]], "is not [operation, level] or [operation, level, probability]"),
    "truth": ([[[["Rotate", True]]]], "True is no level"),
    "uneven": ([[[["Rotate", 1]]], [[["Rotate", 1]], []]], "policy 2: 2 sub-policies, where the first policy has 1"),
    "levels": ({"policies": POLICIES, "levels": 1}, "levels: 1 is not a whole number between 2 and 1000"),
    "too few levels": ({"policies": POLICIES, "levels": 5}, "9 is no level: 0 to 4"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_with_the_place(policy_file, what):
    content, words = BAD[what]
    with pytest.raises(UserError, match=r"bad\.json|bad\.yaml") as refusal:
        read_policies(policy_file("bad.yaml" if isinstance(content, str) else "bad.json", content))
    assert words in str(refusal.value)
    assert len(str(refusal.value).splitlines()) <= 2


def test_lines_of_different_runs_are_refused(policy_file):
    one, two = json.dumps({"policies": POLICIES}), json.dumps({"policies": POLICIES[:1]})
    with pytest.raises(UserError, match="1 policies on a line, where the first line has 2"):
        read_policies(policy_file("mixed.jsonl", f"{one}\n{two}\n"))
    with pytest.raises(UserError, match="differ in the number of levels"):
        read_policies(policy_file("mixed.jsonl", f'{one}\n{{"policies": [], "levels": 9}}\n'))


def test_hostile_files_are_refused(policy_file, tmp_path, monkeypatch):
    """Aliases that stand for a billion operations, tags that would be executed, depth, and files without end."""
    aliases = "a: &a [[Rotate, 1]]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 1000)}]\n" for before, name in ("ab", "bc")
    )
    with pytest.raises(UserError, match=r"holds more than 1,000,000 operations|is no operation|is not \[operation"):
        read_policies(policy_file("aliases.yaml", f"{aliases}policies: *c\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_policies(policy_file("tag.yaml", "policies: !!python/object/apply:os.abort []"))
    with pytest.raises(UserError, match="line 3: "):
        read_policies(policy_file("broken.yaml", "policies:\n  - [[[Rotate, 3]\n - 5"))
    with pytest.raises(UserError, match="cannot be read"):
        read_policies(policy_file("deep.json", "[" * 100_000))
    monkeypatch.setattr(recorded, "LONGEST_YAML", 100)
    with pytest.raises(UserError, match="is longer than 100 bytes"):
        read_policies(policy_file("long.yaml", "# " + "x" * 100))
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match="there is no such file of policies"):
            read_policies(path)
    with pytest.raises(UserError, match="is no file"):
        read_policies(type(tmp_path)("/dev/zero"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("policy=recorded",), "needs policy_from"),
        (("policy=frozen",), "needs policy_from"),
        (("policy=random", "policy_from=x"), "has no meaning with policy: random"),
        (("policy=recorded", "policy_from=nowhere"), "there is no such file of policies"),
        (("policy=frozen", "policy_from=nowhere"), "there is no such file to take a controller from"),
        (("policy=learned",), "is not one of controller, random, none, recorded, frozen"),
        (("reward=lost",), "is not one of loss, teacher"),
        (("jsd=12",), "needs policy: augmix"),
        (("jsd=12", "policy=augmix"), "compares copies of one crop: set crop_per_copy to false"),
        (("clean_share=1.5",), "is not between 0 and 1"),
        (("optimizer=adam",), "is not one of sgd, adamw"),
    ],
)
def test_invalid_settings_of_policies_are_refused(script, tmp_path, settings, words):
    done = script("main.py", "--logdir", tmp_path, "--set", *settings)
    assert_refused(done, words)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def little(train, monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)
    return lambda name, *settings: train(name, *LITTLE, *settings)


LEARNED = ("controller_lr=0.1", "policy_interval=2", "levels=7", "ops=[Rotate, ShearX, Invert]", "Q=3", "logit_bound=4")


def test_a_learned_controller_is_transferred_unchanged(little):
    """Its operations, levels, Q and K come with it, whatever the new run's settings."""
    learned = little("learned", *LEARNED)
    run = little("transfer", "policy=frozen", f"policy_from={learned}", "M=3", "policy_interval=2")
    own = load_tensors(learned / "model.pt")["controller"]
    assert same(final_state(run)["policies"]["controller"], own)
    assert same(own, final_state(learned)["policies"]["controller"])
    records = lines(run / "policies.jsonl")
    assert {(len(r["policies"]), len(r["policies"][0]), r["levels"], r["collapsed"]) for r in records} == {
        (3, 3, 7, None)
    }
    assert {op for r in records for p in r["policies"] for s in p for op, _ in s} <= {"Rotate", "ShearX", "Invert"}
    assert "controller" not in load_tensors(run / "model.pt")
    from_file = ("policy=frozen", f"policy_from={learned / 'model.pt'}", "M=3", "policy_interval=2")
    little("parts", *from_file, "--stop_epoch=1")
    assert files(little("parts", *from_file, "--resume")) == files(run), "also when named by its model.pt, and resumed"


def test_a_record_is_replayed_in_a_run_of_another_length(little):
    recorded = little("recorded", *LEARNED)
    theirs = [record["policies"] for record in lines(recorded / "policies.jsonl")]
    twice = little("twice", "policy=recorded", f"policy_from={recorded}", "policy_interval=1")
    ours = [record["policies"] for record in lines(twice / "policies.jsonl")]
    assert len(theirs) == 6
    assert ours == [policies for policies in theirs for _ in range(2)]
    once = little("once", "policy=recorded", f"policy_from={recorded / 'policies.jsonl'}", "policy_interval=4")
    assert [record["policies"] for record in lines(once / "policies.jsonl")] == [theirs[0], theirs[2], theirs[4]]


def test_policy_from_may_move_but_not_change_form(little, script, tmp_path, policy_file):
    file = policy_file("mine.json", POLICIES)
    settings = ("policy=recorded", "policy_interval=2", "M=2")
    whole = little("whole", *settings, f"policy_from={file}")
    little("parts", *settings, f"policy_from={file}", "--stop_epoch=1")
    moved = file.rename(tmp_path / "moved.json")
    assert files(little("parts", *settings, f"policy_from={moved}", "--resume")) == files(whole)
    little("other", *settings, f"policy_from={moved}", "--stop_epoch=1")
    moved.write_text(json.dumps({"policies": POLICIES, "levels": 20}))
    again = ("--logdir", tmp_path, "--name", "other", "--resume")
    done = script("main.py", *again, "--set", *TINY, *LITTLE, *settings, f"policy_from={moved}")
    assert_refused(done, "policy_from holds policies of another form than when the run started")


def test_sub_policies_of_too_different_lengths_are_refused(policy_file):
    operation = ["Rotate", 1]
    with pytest.raises(UserError, match="of too different lengths, up to 3,000 operations"):
        read_policies(policy_file("wide.json", [[[operation] * 3000, *[[] for _ in range(3000)]]]))


def test_a_run_without_a_controller_has_none_to_transfer(little, script, tmp_path):
    control = little("control", "policy=random")
    done = script("main.py", "--logdir", tmp_path, "--set", "policy=frozen", f"policy_from={control}")
    assert_refused(done, "holds no controller, it was trained with policy: 'random'")
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    assert_refused(
        script("main.py", "--logdir", tmp_path / "x", "--set", "policy=frozen", f"policy_from={tmp_path}"),
        "cannot be read as a checkpoint",
    )


def test_a_controller_of_other_settings_is_refused(little, tmp_path):
    content = load_tensors(little("learned", *LEARNED) / "model.pt")
    for change, words in (
        ({"config": content["config"] | {"levels": 8}}, "its controller does not fit its settings"),
        ({"controller": {"lstm": 5}}, "its controller does not fit its settings"),
        ({"controller": {k: v * float("nan") for k, v in content["controller"].items()}}, "not finite"),
        ({"config": content["config"] | {"ops": ["Rotat"]}}, "unknown operation"),
        ({"controller": [1]}, "holds no controller, it was trained with policy: 'controller'"),
    ):
        torch.save(content | change, tmp_path / "forged.pt")
        with pytest.raises(UserError, match=words):
            read_controller(tmp_path / "forged.pt")
    controller, ops, levels = read_controller(tmp_path / "learned")
    assert (controller.Q, controller.logit_bound, ops, levels) == (3, 4.0, ("Rotate", "ShearX", "Invert"), 7)
    assert isinstance(FrozenPolicies(2, controller, ops, levels), PolicySource)
