"""What goes wrong while a network learns is noticed in its step, told, kept out of checkpoints, and gone back from."""

import math
from collections import Counter

import pytest
import torch
from conftest import (
    ALONE,
    LITTLE,
    TINY,
    Unkept,
    assert_refused,
    files,
    final_state,
    lines,
    little_network,
    on_ranks,
    same,
    scripts_on_ranks,
)
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import main
import policies.learned as learned
import training.manager as manager
from augmentations import OPS
from config import Config
from datasets.splits import ResidentSplit
from training.checkpoint import Checkpoints
from training.distributed import digest
from training.health import CollapseCount, FiniteMonitor, NotFinite, collapse_message
from training.state import TrainingState
from utils import load_tensors

CPU, META = torch.device("cpu"), torch.device("meta")
NAN, INF = math.nan, math.inf
STEPS = 4  # of an epoch of the smallest run


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)


# Numbers, by hand


def note(numbers, step, loss, norm, scaled=False, dtype=torch.float32, policy=1):
    """A step in which the loss under one of three policies, and the norm of the gradient, are these."""
    loss_M = torch.ones(3, device=numbers.device, dtype=dtype)
    loss_M[policy] = loss
    numbers.observe(step, loss_M, torch.tensor(norm, device=numbers.device, dtype=dtype), scaled=scaled)


def observed(*steps, scaled=False, device=CPU, policy=1):
    """What has been noted of (loss, norm of the gradient) step by step."""
    numbers = FiniteMonitor(device)
    for step, (loss, norm) in enumerate(steps):
        note(numbers, step, loss, norm, scaled, policy=policy)
    return numbers


def what_is_wrong(numbers, world=ALONE, **state):
    """(quantity, first step, ranks, policies), or None."""
    try:
        numbers.require_finite(world, **state)
    except NotFinite as error:
        return error.what, error.step, error.ranks, error.policies
    return None


GOOD = (2.3, 1.5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_that_was_not_finite_is_kept(bad, dtype):
    for quantity, step in (("loss", (bad, 1.0)), ("gradient", (2.3, bad))):
        numbers = FiniteMonitor(CPU)
        for number, (loss, norm) in enumerate((GOOD, GOOD, step, GOOD, step)):
            assert numbers.look() == (number > 2)
            note(numbers, number, loss, norm, dtype=dtype)
        assert numbers.look()
        assert what_is_wrong(numbers) == (quantity, 2, [0], [1] if quantity == "loss" else [])
        assert what_is_wrong(numbers) == (quantity, 2, [0], [1] if quantity == "loss" else []), "asking changes nothing"
        numbers.reset()
        assert not numbers.look()
        assert what_is_wrong(numbers) is None


def test_in_one_step_the_loss_is_named_before_the_gradient():
    numbers = observed(GOOD, (NAN, NAN))
    assert what_is_wrong(numbers) == ("loss", 1, [0], [1])
    with pytest.raises(FloatingPointError, match=r"^the loss is no longer finite$"):
        numbers.require_finite(ALONE)


STREAM = st.lists(st.tuples(*(st.sampled_from([1.0, 1.0, 1.0, NAN, INF, -INF]),) * 2), max_size=12)


@given(STREAM, st.booleans(), st.integers(0, 3))
def test_the_monitor_finds_the_first_bad_step_of_any_stream(stream, scaled, skipped_before):
    numbers = FiniteMonitor(CPU)
    numbers.reset(skipped_before)
    for step, (loss, norm) in enumerate(stream):
        note(numbers, step, loss, norm, scaled)
    bad_losses = [step for step, (loss, _) in enumerate(stream) if not math.isfinite(loss)]
    bad_gradients = [step for step, (_, norm) in enumerate(stream) if not math.isfinite(norm)]
    noted = [] if scaled else bad_gradients
    assert numbers.look() == bool(bad_losses or noted)
    found = what_is_wrong(numbers)
    assert (found is None) == (not bad_losses and not noted)
    if found and found[0] == "loss":
        assert found[1] == bad_losses[0]
    elif found:
        assert found[1] == noted[0]
    assert int(numbers.skipped) == skipped_before + (len(bad_gradients) if scaled else 0)


def test_steps_that_a_scaler_skips_are_counted():
    numbers = observed(GOOD, (2.3, INF), (2.3, NAN), GOOD, scaled=True)
    assert not numbers.look()
    assert what_is_wrong(numbers) is None
    assert int(numbers.skipped) == 2
    note(numbers, 4, NAN, 1.0, scaled=True)
    assert what_is_wrong(numbers) == ("loss", 4, [0], [1]), "no smaller scale mends a loss"
    numbers.reset(7)
    assert int(numbers.skipped) == 7
    numbers.reset()
    assert int(numbers.skipped) == 0


@pytest.mark.parametrize("scaled", [False, True])
def test_observing_a_step_reads_nothing_from_its_device(scaled):
    """A meta tensor has no values: whatever asks for one raises."""
    numbers = observed(GOOD, (NAN, INF), GOOD, scaled=scaled, device=META)
    numbers.reset(3)
    note(numbers, 0, 1.0, 1.0, scaled)
    assert numbers.skipped.device == META
    with pytest.raises(RuntimeError, match="meta tensor"):
        numbers.require_finite(ALONE)


@pytest.mark.cuda
def test_a_look_on_a_gpu_does_not_wait(device):
    numbers = observed(GOOD, (NAN, 1.0), device=device)
    seen = numbers.look()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert seen or numbers.look()
    if device.type != "cuda":
        return
    note(numbers, 2, 1.0, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            numbers.look()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_policies_with_a_bad_loss_are_named():
    numbers = FiniteMonitor(CPU)
    for step, bad in enumerate(({}, {1: NAN, 3: INF, 4: -INF}, {0: NAN, 1: NAN, 2: NAN})):
        sums_M = torch.tensor([bad.get(policy, 1.0) for policy in range(5)], dtype=torch.float64)
        numbers.observe(step, sums_M, torch.tensor(1.0), scaled=False)
    assert what_is_wrong(numbers) == ("loss", 1, [0], [1, 3, 4]), "those of the first step where one was"


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_a_network_that_is_not_finite_is_never_saved(bad, where):
    config = Config(model="wresnet10_1", M=3, policy="random")
    for name, tensor in getattr(little_network("", 10), f"named_{where}s")():
        if tensor.is_floating_point():
            state = TrainingState.start(config, ALONE, little_network("", 10))
            state.step = 2
            state.state_dict()
            with torch.no_grad():
                dict(state.model.state_dict(keep_vars=True))[name].view(-1)[-1] = bad
            with pytest.raises(NotFinite, match="the network is no longer finite"):
                state.state_dict()


def of_ranks(world, streams, spoilt=()):
    """What each rank is told, having noted a stream of its own; policy `rank` is bad where the loss is."""
    numbers = observed(*streams[world.rank], policy=world.rank)
    state = [torch.tensor(NAN if world.rank in spoilt else 1.0)]
    return what_is_wrong(numbers, world, state=state, step=5)


BAD_LOSS, BAD_GRADIENT = (NAN, 1.0), (1.0, INF)
AGREEMENTS = {
    "nothing": ([(GOOD,), (GOOD,), (GOOD,)], (), None),
    "the last alone": ([(GOOD, GOOD), (GOOD, GOOD), (GOOD, BAD_LOSS)], (), ("loss", 1, [2], [2])),
    "two of three": ([(BAD_LOSS,), (GOOD,), (BAD_LOSS,)], (), ("loss", 0, [0, 2], [0, 2])),
    "the earlier of two": ([(GOOD, GOOD, BAD_LOSS), (GOOD, BAD_LOSS, GOOD), (GOOD,) * 3], (), ("loss", 1, [1], [1])),
    "a gradient": ([(GOOD, BAD_GRADIENT), (GOOD, GOOD), (GOOD, GOOD)], (), ("gradient", 1, [0], [])),
    "a gradient of all": ([(GOOD, BAD_GRADIENT)] * 3, (), ("gradient", 1, [0, 1, 2], [])),
    "a network": ([(GOOD,)] * 3, (1,), ("network", 5, [1], [])),
    "a loss before a network": ([(GOOD,), (GOOD,), (BAD_LOSS,)], (0, 1, 2), ("loss", 0, [2], [2])),
}


def all_agreements(world):
    """Each in turn, cut to as many ranks as there are."""
    return {name: of_ranks(world, streams, spoilt) for name, (streams, spoilt, _) in AGREEMENTS.items()}


@pytest.mark.parametrize("size", [2, 3])
def test_all_processes_raise_for_the_fault_of_any(size):
    told = [done.result for done in on_ranks(size, all_agreements)]
    assert all(of_one == told[0] for of_one in told)
    for name, (streams, spoilt, expected) in AGREEMENTS.items():
        if size == 2 and expected:
            _, _, ranks, policies = expected
            ranks, policies = ([number for number in numbers if number < 2] for numbers in (ranks, policies))
            expected = (*expected[:2], ranks, policies) if ranks else None
        if not (size == 2 and name == "a loss before a network"):
            assert told[0][name] == expected, (name, streams, spoilt)


# Collapse, by hand

EVEN = {op.name: 1 / 16 for op in OPS[:16]}


def one_larger(share, count=16):
    others = (1 - share) / max(1, count - 1)
    return {OPS[i].name: share if i == count // 2 else others for i in range(count)}


@pytest.mark.parametrize(
    ("entropy", "shares", "draws", "threshold", "expected"),
    [
        (50.0, EVEN, 80, 0.25, None),
        (12.5, EVEN, 80, 0.25, None),  # exactly the threshold
        (12.4999, EVEN, 80, 0.25, "its entropy is 12.50 of 50.00 nats"),
        (0.0, EVEN, 80, 0.25, "its entropy is 0.00 of 50.00 nats"),
        (0.0, EVEN, 80, 0.0, None),  # switched off
        (49.9, EVEN, 80, 1.0, "its entropy is 49.90 of 50.00 nats"),
        (50.0, EVEN, 80, 1.0, None),
        (0.0, EVEN, 1, 0.25, "its entropy is 0.00 of 50.00 nats"),  # says something however few there are
        (50.0, one_larger(0.5), 80, 0.25, None),  # exactly half
        (50.0, one_larger(0.51), 80, 0.25, f"{OPS[8].name} is 51% of all operations drawn"),
        (50.0, one_larger(1.0), 80, 0.0, f"{OPS[8].name} is 100% of all operations drawn"),
        (50.0, one_larger(1.0), 19, 0.25, None),  # few draws
        (50.0, one_larger(0.55), 20, 0.25, f"{OPS[8].name} is 55% of all operations drawn"),
        (50.0, one_larger(0.55, 4), 20, 0.25, f"{OPS[2].name} is 55% of all operations drawn"),
        (50.0, one_larger(0.66, 3), 80, 0.25, None),
        (50.0, one_larger(0.67, 3), 80, 0.25, f"{OPS[1].name} is 67% of all operations drawn"),
        (50.0, one_larger(0.99, 2), 80, 0.25, None),  # of two operations, one is soon most
        (50.0, one_larger(1.0, 2), 80, 0.25, None),
        (23.0, one_larger(1.0, 1), 80, 0.25, None),
        (50.0, {}, 80, 0.25, None),
        (1.0, one_larger(1.0), 80, 0.25, "its entropy is 1.00 of 50.00 nats"),  # one of two is said
    ],
)
def test_when_a_controller_counts_as_collapsed(entropy, shares, draws, threshold, expected):
    assert collapse_message(entropy, 50.0, shares, draws, threshold) == expected


def test_collapsed_intervals_and_the_first_step_are_counted():
    told = CollapseCount()
    for step, words in ((4, None), (8, "thus"), (12, None), (16, "again")):
        told = told.with_record({"step": step, "collapsed": words})
    assert told == (2, 8)


# Collapse, in whole runs

COLLAPSING = ("controller_lr=0.5", "policy_interval=1", "M=4", "logit_bound=0")


def has_collapsed(record, threshold=0.25):
    """From what is in the log, independent of how the alarm is reckoned."""
    operations = [name for policy in record["policies"] for pairs in policy for name, _ in pairs]
    largest = 10 * (math.log(16) + math.log(10))
    ((_, most),) = Counter(operations).most_common(1)
    return record["entropy"] / largest < threshold or most > len(operations) / 2


@pytest.fixture
def told(script, tmp_path):
    """A run that must succeed: told("name", "--resume", "lr=0.2") -> its directory and what it said."""

    def run(name, *arguments):
        flags = [word for word in arguments if word.startswith("-")]
        said = [word for word in arguments if not word.startswith("-")]
        done = script("main.py", "--logdir", tmp_path, "--name", name, *flags, "--set", *TINY, *LITTLE, *said)
        assert done.status == 0, done.err
        return tmp_path / name, done.out

    return run


def curve(run, tag):
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in board.Scalars(tag)}


def test_a_collapse_is_reported_once_and_in_every_log(told):
    run, out = told("collapsed", *COLLAPSING)
    records = lines(run / "policies.jsonl")
    collapsed = [record["step"] for record in records if has_collapsed(record)]
    assert 3 < len(collapsed) < len(records) == 12, "it begins well, and then collapses"
    assert collapsed == list(range(collapsed[0], 13)), "and stays so"
    assert [record["step"] for record in records if record["collapsed"]] == collapsed
    assert curve(run, "adversary/collapsed") == {r["step"]: float(r["step"] in collapsed) for r in records}
    first = records[collapsed[0] - 1]
    assert out.count("has collapsed") == 1
    assert f"after step {first['step']} the controller has collapsed: {first['collapsed']}\n" in out
    closing = f"The controller collapsed: in {len(collapsed)} intervals, first after step {collapsed[0]};"
    assert closing in out
    assert "policies.jsonl" in out.partition(closing)[2]

    told("parts", *COLLAPSING, "--stop_epoch=1")
    told("parts", *COLLAPSING, "--resume", "--stop_epoch=2")
    parts, out = told("parts", *COLLAPSING, "--resume")
    assert closing in out, "all of the run's intervals, not those since it was resumed"
    assert files(parts) == files(run)
    assert same(final_state(parts), final_state(run))
    assert final_state(run)["collapse"] == [len(collapsed), collapsed[0]]


@pytest.mark.parametrize("policy", ["random", "none"])
def test_a_source_that_does_not_learn_does_not_collapse(told, monkeypatch, policy):
    monkeypatch.setattr(manager, "collapse_message", lambda *_: "always")
    run, out = told("control", f"policy={policy}", "policy_interval=1")
    assert {record["collapsed"] for record in lines(run / "policies.jsonl")} == {None}
    assert "collapse" not in out
    assert set(curve(run, "adversary/collapsed").values()) == {0.0}
    assert final_state(run)["collapse"] == [0, -1]


# Faults in whole runs


class Fault:
    """Spoils steps of the network that are `due`, `times` at most, as a fault would: what follows is the program's own.

    what: "loss" of one policy's copies, and with it the gradient; "gradient" alone; a "weight" or a "buffer" after the
    step. due: of the state in a step. `inputs` are digests of what the network was shown in each step, in order.
    """

    def __init__(self, monkeypatch, what, due, *, times=1, value=NAN, policy=1):
        self.what, self.due, self.left, self.value, self.policy = what, due, times, value, policy
        self.state, self.inputs = None, []
        self._learn, self._descend, self._cross_entropy = main.learn, main.descend, main.F.cross_entropy
        monkeypatch.setattr(main, "learn", self.learn)
        monkeypatch.setattr(main, "descend", self.descend)
        monkeypatch.setattr(main.F, "cross_entropy", self.cross_entropy)

    def strikes(self, *kinds):
        struck = self.what in kinds and self.left > 0 and self.state is not None and self.due(self.state)
        self.left -= struck
        return struck

    def learn(self, state, inputs_BCHW, *arguments):
        self.state = state
        self.inputs.append(((state.epoch, state.step), digest(inputs_BCHW)))
        try:
            return self._learn(state, inputs_BCHW, *arguments)
        finally:
            self.state = None

    def cross_entropy(self, *arguments, **options):
        loss_B = self._cross_entropy(*arguments, **options)
        if self.strikes("loss"):
            factor_B = torch.ones_like(loss_B)
            factor_B.view(-1, self.state.config.M)[:, self.policy] = self.value
            return loss_B * factor_B
        if self.strikes("gradient"):
            loss_B.register_hook(lambda gradient_B: gradient_B * self.value)
        return loss_B

    def descend(self, state, lr):
        norm, self.state = self._descend(state, lr), state
        if self.strikes("weight", "buffer"):
            tensor = next(state.model.parameters() if self.what == "weight" else state.model.buffers())
            tensor.data[(0,) * tensor.dim()] = self.value
        self.state = None
        return norm


def at(epoch, step, rank=None):
    """Whether a state is in that step, from 0."""
    return lambda state: (state.epoch, state.step) == (epoch, step) and rank in (None, state.world.rank)


SAID = ("M=3",)


def command(tmp_path, name, *arguments):
    flags = [word for word in arguments if word.startswith("-")]
    said = [word for word in arguments if not word.startswith("-")]
    return "main.py", "--logdir", tmp_path, "--name", name, *flags, "--set", *TINY, *LITTLE, *SAID, *said


def positions(run):
    return sorted(tuple(map(int, file.name.split("-")[1:4:2])) for file in (run / "checkpoints").iterdir())


def assert_finite(run):
    """Every number in every checkpoint, and in model.pt."""

    def numbers(value):
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all()
        elif isinstance(value, float):
            assert math.isfinite(value)
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                numbers(item)

    for file in [*(run / "checkpoints").iterdir(), *run.glob("model.pt")]:
        numbers(load_tensors(file))


def without_rewinds(state):
    return {name: value for name, value in state.items() if name != "rewinds"}


@pytest.mark.parametrize(
    ("what", "value", "settings", "where", "last"),
    [
        ("loss", NAN, (), "the loss is no longer finite in epoch 2, step 3 (process 0; policy 2)", (1, 0)),
        ("loss", INF, ("checkpoint_every=1",), "the loss is no longer finite in epoch 2, step 3 (process 0; ", (1, 2)),
        ("loss", NAN, ("policy_interval=1",), "the loss is no longer finite in epoch 2, step 3 (process 0; ", (1, 0)),
        ("loss", NAN, ("accumulate=2",), "the loss is no longer finite in epoch 2, step 3 (process 0; policy", (1, 0)),
        ("loss", NAN, ("policy=none",), "the loss is no longer finite in epoch 2, step 3 (process 0; pol", (1, 0)),
        ("gradient", INF, ("grad_clip=1",), "the gradient is no longer finite in epoch 2, step 3 (process 0)", (1, 0)),
        ("weight", INF, (), " is no longer finite in epoch 2, step 4 (process 0", (1, 0)),
        ("buffer", NAN, (), "the network is no longer finite in epoch 2, step 4 (process 0)", (1, 0)),
    ],
)  # fmt: skip
def test_a_fault_stops_the_run_and_its_checkpoint_resumes(
    script, tmp_path, monkeypatch, what, value, settings, where, last
):
    """In the third step of the second epoch, the seventh of all."""
    assert script(*command(tmp_path, "whole", *settings)).status == 0
    with monkeypatch.context() as patched:
        Fault(patched, what, at(1, 2), value=value)
        done = script(*command(tmp_path, "faulty", *settings))
    run = tmp_path / "faulty"
    assert_refused(done, f"{run}: ", where, "earlier checkpoints are kept", "lower lr", "grad_clip", "warmup_epochs")
    (incident,) = lines(run / "incidents.jsonl")
    assert f"{incident['incident']} in epoch {incident['epoch']}, step {incident['step']}" in done.err
    assert (incident["processes"], incident["rewind"]) == ([0], None)
    assert (incident["of_policies"] == [1]) == (what == "loss")
    interval = 6 if "policy_interval=1" in settings else 1
    assert incident["policies"] == lines(tmp_path / "whole" / "policies.jsonl")[interval]["policies"]
    told = done.out.split("with these policies in use:\n")[1].splitlines()
    for number, (line, policy) in enumerate(zip(told, incident["policies"], strict=True), start=1):
        assert line.startswith(f"  {number}. ")
        assert [word for word in line.split() if word in EVEN] == [name for pairs in policy for name, _ in pairs]
    assert positions(run)[-1] == last
    assert_finite(run)

    assert script(*command(tmp_path, "faulty", "--resume", *settings)).status == 0
    assert files(run) == files(tmp_path / "whole")
    assert same(final_state(run), final_state(tmp_path / "whole"))


@pytest.mark.parametrize("what", ["loss", "gradient", "weight", "buffer"])
def test_a_fault_just_before_a_checkpoint_is_not_saved(script, tmp_path, monkeypatch, what):
    """Nor at the end of an epoch, where model.pt is written as well."""
    for name, step, before in (("within", 1, (1, 0)), ("end", 3, (1, 2))):
        with monkeypatch.context() as patched:
            Fault(patched, what, at(1, step))
            done = script(*command(tmp_path, name, "checkpoint_every=2"))
        assert_refused(done, "is no longer finite in epoch 2, step ")
        assert positions(tmp_path / name)[-1] == before
        assert_finite(tmp_path / name)
        assert load_tensors(tmp_path / name / "model.pt")["epoch"] == 1


REWIND = "on_nonfinite=rewind"


@pytest.mark.parametrize(
    ("what", "value", "settings"),
    [
        ("loss", NAN, ()),
        pytest.param("loss", INF, ("checkpoint_every=1",), marks=pytest.mark.slow),
        pytest.param(
            "loss", NAN, ("checkpoint_every=2", "policy_interval=3", "controller_lr=0.05"), marks=pytest.mark.slow
        ),
        ("gradient", NAN, ("policy_interval=3",)),
        pytest.param("weight", INF, ("checkpoint_every=2",), marks=pytest.mark.slow),
        pytest.param("buffer", NAN, ("policy_interval=5",), marks=pytest.mark.slow),
    ],
)
def test_a_fault_that_happens_once_leaves_no_trace(script, tmp_path, monkeypatch, what, value, settings):
    """But in incidents.jsonl, and in the count of times that the run went back."""
    assert script(*command(tmp_path, "whole", REWIND, *settings)).status == 0
    Fault(monkeypatch, what, at(1, 2), value=value)
    done = script(*command(tmp_path, "faulty", REWIND, *settings))
    run, whole = tmp_path / "faulty", tmp_path / "whole"
    assert done.status == 0, done.err
    step = {"checkpoint_every=1": 3, "checkpoint_every=2": 3}.get(settings[0] if settings else "", 1)
    assert f"\nback to epoch 2, step {step} (1 of 2 rewinds)\n" in done.out
    assert "Numbers were not finite once: incidents.jsonl says where." in done.out
    assert [(i["rewind"], i["epoch"]) for i in lines(run / "incidents.jsonl")] == [(1, 2)]
    assert files(run) == files(whole)
    assert [line["epoch"] for line in lines(run / "times.jsonl")] == [1, 2, 3]
    assert same(without_rewinds(final_state(run)), without_rewinds(final_state(whole)))
    assert (final_state(run)["rewinds"], final_state(whole)["rewinds"]) == (1, 0)
    assert same(load_tensors(run / "model.pt"), load_tensors(whole / "model.pt"))


@pytest.mark.slow
def test_a_second_rewind_changes_the_draws(script, tmp_path, monkeypatch):
    """In step 3 of the second epoch, from its third policies on, for what the network is shown there at first."""
    fault = Fault(monkeypatch, "loss", None, times=99)
    fault.due = lambda state: fault.inputs[-1] == next((seen for seen in fault.inputs if seen[0] == (1, 2)), None)
    done = script(*command(tmp_path, "recurring", REWIND, "policy_interval=3"))
    assert done.status == 0, done.err
    assert fault.left == 97
    shown = [inputs for place, inputs in fault.inputs if place == (1, 2)]
    assert shown[0] == shown[1] != shown[2]
    assert len(shown) == 3
    start = [inputs for place, inputs in fault.inputs if place == (1, 0)]
    assert start[0] == start[1] != start[2], "from the checkpoint on"
    run = tmp_path / "recurring"
    assert [incident["rewind"] for incident in lines(run / "incidents.jsonl")] == [1, 2]
    assert "(2 of 2 rewinds)" in done.out
    assert "Numbers were not finite 2 times" in done.out
    assert final_state(run)["rewinds"] == 2
    assert [line["epoch"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert_finite(run)

    assert script(*command(tmp_path, "parts", REWIND, "policy_interval=3", "--stop_epoch=2")).status == 0
    assert same(without_clock(run / "metrics.jsonl", 1), without_clock(tmp_path / "parts" / "metrics.jsonl", 1))


def without_clock(path, count):
    return lines(path)[:count]


def test_the_third_fault_stops_the_run(script, tmp_path, monkeypatch):
    Fault(monkeypatch, "loss", at(1, 2), times=99)
    done = script(*command(tmp_path, "always", REWIND))
    run = tmp_path / "always"
    assert_refused(done, "the loss is no longer finite in epoch 2, step 3", "after 2 rewinds", "lower lr")
    assert [incident["rewind"] for incident in lines(run / "incidents.jsonl")] == [1, 2, None]
    assert positions(run)[-1] == (1, 0)
    assert_finite(run)
    assert_refused(script(*command(tmp_path, "always", REWIND, "--resume")), "after 2 rewinds")
    assert [incident["rewind"] for incident in lines(run / "incidents.jsonl")] == [1, 2, None, None]


@pytest.mark.parametrize("settings", [(), (REWIND,)])
def test_incidents_are_shown_in_tensorboard(script, tmp_path, monkeypatch, settings):
    Fault(monkeypatch, "loss", at(1, 2))
    assert script(*command(tmp_path, "run", *settings)).status == (0 if settings else 2)
    assert script(*command(tmp_path, "run", "--resume", *settings)).status == 0
    board = plugin_event_accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    (event,) = board.Tensors("incidents/text_summary")
    text = tensor_util.make_ndarray(event.tensor_proto).reshape(-1)[0]
    assert text.startswith(
        b"the loss is no longer finite in epoch 2, step 3 (process 0; policy 2), with these policies"
    )


def test_a_rewind_skips_a_damaged_checkpoint(script, tmp_path, monkeypatch):
    """It was damaged after it was written; the one before is as exact."""
    assert script(*command(tmp_path, "whole", REWIND, "checkpoint_every=1")).status == 0
    run = tmp_path / "faulty"

    def due(state):
        if not at(1, 2)(state):
            return False
        newest = run / "checkpoints" / next(f.name for f in run.glob("checkpoints/epoch-0001-step-000002-*"))
        newest.write_bytes(newest.read_bytes()[:-1])
        return True

    fault = Fault(monkeypatch, "loss", due)
    done = script(*command(tmp_path, "faulty", REWIND, "checkpoint_every=1"))
    assert done.status == 0, done.err
    assert fault.left == 0
    assert "is damaged" in done.err
    assert "back to epoch 2, step 2 (1 of 2 rewinds)" in done.out
    assert files(run) == files(tmp_path / "whole")
    assert same(without_rewinds(final_state(run)), without_rewinds(final_state(tmp_path / "whole")))


# The controller


def spoil_controller(monkeypatch, value):
    """Whenever it has learned, its weights are as large as this."""
    reinforce = learned.reinforce

    def spoilt(controller, *arguments, **options):
        learned = reinforce(controller, *arguments, **options)
        with torch.no_grad():
            for parameter in controller.parameters():
                parameter.copy_(value * parameter.sign())
        return learned

    monkeypatch.setattr(learned, "reinforce", spoilt)


@pytest.mark.parametrize("on_nonfinite", ["stop", "rewind"])
@pytest.mark.parametrize("value", [INF, NAN, 1e30])
def test_a_controller_that_is_not_finite_ends_the_run(script, tmp_path, monkeypatch, value, on_nonfinite):
    """Its weights, or what comes of them in the next interval."""
    spoil_controller(monkeypatch, value)
    done = script(*command(tmp_path, "run", "policy_interval=1", f"on_nonfinite={on_nonfinite}"))
    again = ", after 2 rewinds" if on_nonfinite == "rewind" else ""
    assert_refused(done, f"the controller is no longer finite in epoch 1, step 1{again}; earlier checkpoints are")
    assert_finite(tmp_path / "run")
    incidents = lines(tmp_path / "run" / "incidents.jsonl")
    assert [incident["rewind"] for incident in incidents] == ([1, 2, None] if again else [None])
    assert incidents[-1]["processes"] == [], "of none, for all have the same"


# Several processes


def run_on_ranks(tmp_path, name, *arguments, size=2):
    ranks = scripts_on_ranks(size, *command(tmp_path, name, *arguments))
    assert all(not rank.out for rank in ranks[1:]), "only the leader prints"
    return ranks


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("loss", "the loss is no longer finite in epoch 2, step 3 (process 1; "),
        ("gradient", "the gradient is no longer finite in epoch 2, step 3 (process 0, 1)"),
        ("buffer", "the network is no longer finite in epoch 2, step 4 (process 1)"),
    ],
)
def test_all_processes_stop_for_the_fault_of_one(script, tmp_path, monkeypatch, what, where):
    Fault(monkeypatch, what, at(1, 2, rank=1))
    ranks = run_on_ranks(tmp_path, "run")
    assert [rank.status for rank in ranks] == [2, 2]
    err = "".join(rank.err for rank in ranks)
    assert "Traceback" not in err
    assert len(err.splitlines()) == 2, err
    assert where in err
    (incident,) = lines(tmp_path / "run" / "incidents.jsonl")
    assert incident["epoch"] == 2
    assert positions(tmp_path / "run")[-1] == (1, 0)
    assert_finite(tmp_path / "run")


def test_the_policy_of_the_faulty_process_is_named(tmp_path, monkeypatch):
    """And not those whose losses were spoilt by the weights that came of it."""
    Fault(monkeypatch, "loss", at(1, 1, rank=1))
    err = "".join(rank.err for rank in run_on_ranks(tmp_path, "run"))
    assert "the loss is no longer finite in epoch 2, step 2 (process 1; policy 2)" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "settings"),
    [
        ("loss", ()),
        pytest.param(
            "gradient", ("checkpoint_every=1", "policy_interval=3", "controller_lr=0.05"), marks=pytest.mark.slow
        ),
    ],
)
def test_all_processes_rewind_for_the_fault_of_one(tmp_path, monkeypatch, what, settings):
    run_on_ranks(tmp_path, "whole", REWIND, *settings)
    Fault(monkeypatch, what, at(1, 2, rank=1))
    ranks = run_on_ranks(tmp_path, "faulty", REWIND, *settings)
    assert [rank.status for rank in ranks] == [0, 0], ranks
    assert "(1 of 2 rewinds)" in ranks[0].out
    run, whole = tmp_path / "faulty", tmp_path / "whole"
    assert [(i["rewind"], i["epoch"]) for i in lines(run / "incidents.jsonl")] == [(1, 2)]
    assert files(run) == files(whole)
    assert same(without_rewinds(final_state(run)), without_rewinds(final_state(whole)))


# float16: steps that the scaler leaves out


class Scales(Unkept):
    """Notes the scaler's scale after each step."""

    def __init__(self, state):
        super().__init__()
        self.state, self.scales = state, [state.scaler.get_scale()]

    def after_step(self):
        self.scales.append(self.state.scaler.get_scale())

    def drops(self):
        return sum(after < before for before, after in zip(self.scales, self.scales[1:], strict=False))


def scaled_state(scale=2.0**16, growth_interval=2, **settings):
    """Of a run whose loss is scaled, as on CUDA, by a scale that soon grows again."""
    config = Config(model="wresnet10_1", dataset="shapes", M=2, batch_size=10, epochs=3, **settings)
    torch.manual_seed(0)
    state = TrainingState.start(config, ALONE, little_network("", 10))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return state


def images(count):
    g = torch.Generator().manual_seed(0)
    return ResidentSplit(
        torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(count) % 10
    )


def overflowing(monkeypatch, *steps):
    """Gradients are infinite in these steps of every epoch."""
    Fault(monkeypatch, "gradient", lambda state: state.step in steps, times=99, value=INF)


@pytest.mark.parametrize("settings", [{}, {"grad_clip": 0.1}, {"accumulate": 2}, {"policy": "random"}])
def test_skipped_steps_are_those_at_which_the_scale_drops(monkeypatch, settings):
    overflowing(monkeypatch, 0, 3, 4, 11)
    state, split = scaled_state(**settings), images(200)
    for _ in range(2):
        metrics = main.train_one_epoch(state, split, noted := Scales(state))
        assert len(noted.scales) == 21
        assert metrics["skipped_steps"] == int(state.monitor.skipped) == noted.drops() == 4, "of this epoch"
        assert all(parameter.isfinite().all() for parameter in state.model.parameters())
        state.end_epoch()
        assert int(state.monitor.skipped) == 0


def test_skipped_steps_survive_a_save_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    overflowing(monkeypatch, 1, 2, 7, 15)
    whole, split = scaled_state(), images(200)
    expected = main.train_one_epoch(whole, split, noted := Scales(whole))

    class Stop(Scales):
        def after_step(self):
            super().after_step()
            if self.state.step == 9:
                raise InterruptedError

    part = scaled_state()
    with pytest.raises(InterruptedError):
        main.train_one_epoch(part, split, stopped := Stop(part))
    assert int(part.monitor.skipped) == stopped.drops() == 3
    Checkpoints(tmp_path).save(part.state_dict() | {"positions": {}, "data": ""})
    resumed = scaled_state(scale=1.0)
    resumed.load_state_dict(Checkpoints(tmp_path).load_newest(pytest.fail), tmp_path)
    assert int(resumed.monitor.skipped) == stopped.drops()
    assert resumed.scaler.get_scale() == part.scaler.get_scale()
    metrics = main.train_one_epoch(resumed, split, rest := Scales(resumed))
    assert metrics == expected
    assert metrics["skipped_steps"] == stopped.drops() + rest.drops() == noted.drops() == 4
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_bad_loss_is_reported_even_with_a_scaler(monkeypatch):
    state = scaled_state(scale=1.0)
    Fault(monkeypatch, "loss", at(0, 5))
    with pytest.raises(NotFinite, match="the loss is no longer finite") as error:
        main.train_one_epoch(state, images(200), Scales(state))
    assert (error.value.step, error.value.policies) == (5, [1])
    assert all(parameter.isfinite().all() for parameter in state.model.parameters()), "the step was left out"


def with_scaler(monkeypatch, **options):
    start = TrainingState.start

    def scaled(*arguments):
        state = start(*arguments)
        state.scaler = torch.amp.GradScaler("cpu", **options)
        return state

    monkeypatch.setattr(TrainingState, "start", scaled)


def test_skipped_steps_are_logged_and_printed(told, monkeypatch):
    plain, out = told("plain")
    assert all("skipped_steps" not in line for line in lines(plain / "metrics.jsonl"))
    assert "float16" not in out
    with_scaler(monkeypatch, init_scale=2.0**16)
    infinite = {(0, 1), (0, 2), (2, 0)}
    Fault(monkeypatch, "gradient", lambda state: (state.epoch, state.step) in infinite, times=99, value=INF)
    run, out = told("scaled", "checkpoint_every=1")
    counts = [line["skipped_steps"] for line in lines(run / "metrics.jsonl")]
    assert counts == [2, 0, 1]
    assert final_state(run)["scaler"]["scale"] == 2.0**13, "halved three times"
    told_lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    for line, count in zip(told_lines, counts, strict=True):
        assert (f", {count} steps skipped (float16), " in line) == (count > 0)
    assert curve(run, "run/skipped_steps") == {4 * (i + 1): count for i, count in enumerate(counts)}

    told("parts", "checkpoint_every=1", "--stop_epoch=1")
    max((run.parent / "parts" / "checkpoints").iterdir()).unlink()
    assert positions(run.parent / "parts")[-1] == (0, 3)
    parts, _ = told("parts", "checkpoint_every=1", "--resume")
    assert files(parts) == files(run)
    assert same(final_state(parts), final_state(run))
