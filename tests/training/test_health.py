"""Detection of numbers that are not finite, of steps skipped by float16's scaler, and of a collapsed controller."""

import math
from collections import Counter

import pytest
import torch
from conftest import ALONE, LITTLE, TINY, Unkept, files, final_state, lines, little_network, no_waits, on_ranks, same
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import training.manager as manager
from augmentations import OPS
from config import Config
from controller import Controller
from datasets.splits import ResidentSplit
from training.checkpoint import Checkpoints
from training.health import CollapseCount, FiniteMonitor, NotFinite, collapse_message
from training.state import TrainingState

CPU, META = torch.device("cpu"), torch.device("meta")
NAN, INF = math.nan, math.inf
GOOD, BAD_LOSS, BAD_GRADIENT = (2.3, 1.5), (NAN, 1.0), (1.0, INF)  # loss, and norm of the gradient


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)


# The monitor


def note(monitor, step, loss, norm, scaled=False, policy=1):
    """A step with this loss under one of three policies, and this norm of the gradient."""
    loss_M = torch.ones(3, device=monitor.device)
    loss_M[policy] = loss
    monitor.observe(step, loss_M, torch.tensor(norm, device=monitor.device), scaled=scaled)


def observed(*steps, scaled=False, device=CPU, policy=1):
    """A monitor of these (loss, norm of the gradient), step by step."""
    monitor = FiniteMonitor(device)
    for step, (loss, norm) in enumerate(steps):
        note(monitor, step, loss, norm, scaled, policy=policy)
    return monitor


def finding(monitor, world=ALONE, **state):
    """(quantity, first step, ranks, policies), or None."""
    try:
        monitor.require_finite(world, **state)
    except NotFinite as error:
        return error.what, error.step, error.ranks, error.policies
    return None


LARGEST = torch.finfo(torch.float32).max
STREAM = st.lists(st.tuples(*(st.sampled_from([1.0, 1.0, -LARGEST, NAN, INF, -INF]),) * 2), max_size=12)


@given(STREAM, st.booleans(), st.integers(0, 3))
def test_the_earliest_bad_number_of_any_stream_is_named(stream, scaled, skipped_before):
    """The loss before the gradient of its step. With a scaler, steps with bad gradients are counted instead."""
    monitor = FiniteMonitor(CPU)
    monitor.reset(skipped_before)
    bad, skipped = [], 0
    for step, (loss, norm) in enumerate(stream):
        note(monitor, step, loss, norm, scaled)
        bad += [] if math.isfinite(loss) else [("loss", step, [0], [1])]
        bad += [] if scaled or math.isfinite(norm) else [("gradient", step, [0], [])]
        skipped += scaled and not math.isfinite(norm)
        assert monitor.look() == bool(bad)
    assert [finding(monitor), finding(monitor)] == [bad[0] if bad else None] * 2, "asking changes nothing"
    assert int(monitor.skipped) == skipped_before + skipped
    monitor.reset()
    assert (monitor.look(), finding(monitor), int(monitor.skipped)) == (False, None, 0)


@pytest.mark.parametrize("scaled", [False, True])
def test_noting_a_step_reads_nothing_from_its_device(scaled):
    """A meta tensor has no values: reading one raises."""
    monitor = observed(GOOD, (NAN, INF), GOOD, scaled=scaled, device=META)
    monitor.reset(3)
    note(monitor, 0, 1.0, 1.0, scaled)
    with pytest.raises(RuntimeError, match="meta tensor"):
        monitor.require_finite(ALONE)


@pytest.mark.cuda
def test_a_look_does_not_wait_and_sees_it_in_the_end(device):
    monitor = observed(GOOD, (NAN, 1.0), device=device)
    seen = monitor.look()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert seen or monitor.look()
    note(monitor, 2, 1.0, 1.0)
    with no_waits(device):
        for _ in range(3):
            monitor.look()


def test_the_policies_with_a_bad_loss_are_named():
    monitor = FiniteMonitor(CPU)
    for step, bad in enumerate(({}, {1: NAN, 3: INF, 4: -INF}, {0: NAN, 1: NAN, 2: NAN})):
        sums_M = torch.tensor([bad.get(policy, 1.0) for policy in range(5)], dtype=torch.float64)
        monitor.observe(step, sums_M, torch.tensor(1.0), scaled=False)
    assert finding(monitor) == ("loss", 1, [0], [1, 3, 4]), "those of the first bad step"


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_network_that_is_not_finite_is_never_saved(bad):
    """Whichever of its parameters and buffers is not; integers, as of BatchNorm, always are."""
    state = TrainingState.start(Config(M=3, policy="random"), ALONE, little_network("", 10))
    for tensor in [*state.model.parameters(), *state.model.buffers()]:
        if tensor.is_floating_point():
            state.state_dict()
            before = tensor.data.clone()
            tensor.data.view(-1)[-1] = bad
            with pytest.raises(NotFinite, match="the network is no longer finite"):
                state.state_dict()
            tensor.data.copy_(before)


AGREEMENTS = {
    "nothing": ([(GOOD,), (GOOD,), (GOOD,)], (), None),
    "the last alone": ([(GOOD, GOOD), (GOOD, GOOD), (GOOD, BAD_LOSS)], (), ("loss", 1, [2], [2])),
    "two of three": ([(BAD_LOSS,), (GOOD,), (BAD_LOSS,)], (), ("loss", 0, [0, 2], [0, 2])),
    "the earlier of two": ([(GOOD, GOOD, BAD_LOSS), (GOOD, BAD_LOSS, GOOD), (GOOD,) * 3], (), ("loss", 1, [1], [1])),
    "a gradient": ([(GOOD, BAD_GRADIENT), (GOOD, GOOD), (GOOD, GOOD)], (), ("gradient", 1, [0], [])),
    "a network": ([(GOOD,)] * 3, (1,), ("network", 5, [1], [])),
    "a loss before a network": ([(GOOD,), (GOOD,), (BAD_LOSS,)], (0, 1, 2), ("loss", 0, [2], [2])),
}


def test_all_processes_get_the_same_error():
    """Whichever of three noted it; policy r is bad where the loss of rank r is."""

    def findings(world):
        found = {}
        for name, (streams, spoilt, _) in AGREEMENTS.items():
            state = [torch.tensor(NAN if world.rank in spoilt else 1.0)]
            found[name] = finding(observed(*streams[world.rank], policy=world.rank), world, state=state, step=5)
        return found

    expected = {name: error for name, (_, _, error) in AGREEMENTS.items()}
    assert [done.result for done in on_ranks(3, findings)] == [expected] * 3


# float16: steps that the scaler skips


class Scales(Unkept):
    """Notes the scaler's scale after each step."""

    def __init__(self, state):
        super().__init__()
        self.state, self.scales = state, [state.scaler.get_scale()]

    def after_step(self):
        self.scales.append(self.state.scaler.get_scale())

    def drops(self):
        return sum(after < before for before, after in zip(self.scales, self.scales[1:], strict=False))


def scaled_state(scale=2.0**16, **settings):
    """A state with a scaler, as on CUDA; the scale soon grows again."""
    torch.manual_seed(0)
    config = Config(dataset="shapes", M=2, batch_size=10, epochs=3, **settings)
    state = TrainingState.start(config, ALONE, little_network("", 10))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    return state


def images(count):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=g)
    return ResidentSplit(pixels, torch.arange(count) % 10)


def spoil_gradients(monkeypatch, is_due):
    """Gradients are infinite in the steps with is_due(epoch, step)."""
    descend = main.descend

    def spoilt(state, lr):
        if is_due(state.epoch, state.step):
            next(state.model.parameters()).grad.fill_(INF)
        return descend(state, lr)

    monkeypatch.setattr(main, "descend", spoilt)


@pytest.mark.parametrize("settings", [{"grad_clip": 0.1}, {"accumulate": 2, "policy": "random"}])
def test_skipped_steps_are_those_at_which_the_scale_drops(monkeypatch, settings):
    spoil_gradients(monkeypatch, lambda _, step: step in (0, 3, 4, 11))
    state, split = scaled_state(**settings), images(200)
    for _ in range(2):
        metrics = main.train_one_epoch(state, split, noted := Scales(state))
        assert len(noted.scales) == 21
        assert metrics["skipped_steps"] == int(state.monitor.skipped) == noted.drops() == 4, "of this epoch"
        assert all(parameter.isfinite().all() for parameter in state.model.parameters())
        state.end_epoch()
        assert int(state.monitor.skipped) == 0


def test_skipped_steps_are_resumed_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    spoil_gradients(monkeypatch, lambda _, step: step in (1, 2, 7, 15))
    whole, split = scaled_state(), images(200)
    expected = main.train_one_epoch(whole, split, Scales(whole))
    assert expected["skipped_steps"] == 4

    class Stop(Scales):
        def after_step(self):
            super().after_step()
            if self.state.step == 9:
                raise InterruptedError

    part, resumed = scaled_state(), scaled_state(scale=1.0)
    with pytest.raises(InterruptedError):
        main.train_one_epoch(part, split, stopped := Stop(part))
    Checkpoints(tmp_path).save(part.state_dict() | {"positions": {}, "data": ""})
    resumed.load_state_dict(Checkpoints(tmp_path).load_newest(pytest.fail), tmp_path)
    assert int(part.monitor.skipped) == int(resumed.monitor.skipped) == stopped.drops() == 3
    assert main.train_one_epoch(resumed, split, Scales(resumed)) == expected
    assert same(resumed.state_dict(), whole.state_dict())


@pytest.fixture
def run_and_output(script, tmp_path):
    """A run that must succeed: run_and_output("name", "--resume", "lr=0.2") -> its directory and stdout."""

    def run(name, *arguments):
        flags = [word for word in arguments if word.startswith("-")]
        overrides = [word for word in arguments if not word.startswith("-")]
        done = script("main.py", "--logdir", tmp_path, "--name", name, *flags, "--set", *TINY, *LITTLE, *overrides)
        assert done.status == 0, done.err
        return tmp_path / name, done.out

    return run


def curve(run, tag):
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in board.Scalars(tag)}


def test_skipped_steps_are_logged_and_printed(run_and_output, monkeypatch):
    plain, out = run_and_output("plain", "--stop_epoch=1")
    assert "skipped_steps" not in lines(plain / "metrics.jsonl")[0]
    assert "float16" not in out
    start = TrainingState.start

    def with_scaler(*arguments):
        state = start(*arguments)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        return state

    monkeypatch.setattr(TrainingState, "start", with_scaler)
    spoil_gradients(monkeypatch, lambda *place: place in {(0, 1), (0, 2), (2, 0)})
    run, out = run_and_output("scaled")
    assert [line["skipped_steps"] for line in lines(run / "metrics.jsonl")] == [2, 0, 1]
    assert final_state(run)["scaler"]["scale"] == 2.0**13, "halved three times"
    printed = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert [" steps skipped (float16), " in line for line in printed] == [True, False, True]
    assert ", 2 steps skipped (float16), " in printed[0]
    assert curve(run, "run/skipped_steps") == {4: 2.0, 8: 0.0, 12: 1.0}


# A collapsed controller

EVEN = {op.name: 1 / 16 for op in OPS[:16]}


def one_larger(share, count=16):
    others = (1 - share) / max(1, count - 1)
    return {OPS[i].name: share if i == count // 2 else others for i in range(count)}


@pytest.mark.parametrize(
    ("entropy", "shares", "draws", "threshold", "expected"),
    [
        (12.5, EVEN, 80, 0.25, None),  # exactly the threshold
        (12.4999, EVEN, 80, 0.25, "its entropy is 12.50 of 50.00 nats"),
        (0.0, EVEN, 80, 0.0, None),  # switched off
        (0.0, EVEN, 1, 0.25, "its entropy is 0.00 of 50.00 nats"),  # for any number of draws
        (50.0, one_larger(0.5), 80, 0.25, None),  # exactly half
        (50.0, one_larger(0.51), 80, 0.25, f"{OPS[8].name} is 51% of all operations drawn"),
        (50.0, one_larger(1.0), 80, 0.0, f"{OPS[8].name} is 100% of all operations drawn"),
        (50.0, one_larger(1.0), 19, 0.25, None),  # few draws
        (50.0, one_larger(0.66, 3), 80, 0.25, None),
        (50.0, one_larger(0.67, 3), 80, 0.25, f"{OPS[1].name} is 67% of all operations drawn"),
        (50.0, one_larger(1.0, 2), 80, 0.25, None),  # with two operations one easily dominates
        (50.0, {}, 80, 0.25, None),
        (1.0, one_larger(1.0), 80, 0.25, "its entropy is 1.00 of 50.00 nats"),  # one message for both
    ],
)
def test_when_a_controller_counts_as_collapsed(entropy, shares, draws, threshold, expected):
    assert collapse_message(entropy, 50.0, shares, draws, threshold) == expected


def test_an_untrained_controller_is_far_from_collapsed():
    for seed in range(50):
        torch.manual_seed(seed)
        decisions = Controller(16, num_levels=10, Q=5, K=2).sample(8)
        assert decisions.entropy_M.mean() > 0.97 * 10 * (math.log(16) + math.log(10))
        assert decisions.op_MQK.flatten().bincount().max() < 0.4 * 80


COLLAPSING = ("controller_lr=0.5", "logit_bound=0", "policy_interval=1", "M=4")


def has_collapsed(record):
    """By the definition in docs/reliability.md, from the logged policies."""
    operations = [name for policy in record["policies"] for pairs in policy for name, _ in pairs]
    ((_, most),) = Counter(operations).most_common(1)
    return record["entropy"] < 0.25 * 10 * (math.log(16) + math.log(10)) or most > len(operations) / 2


def test_a_collapse_is_reported_once_and_everywhere(run_and_output):
    run, out = run_and_output("collapsed", *COLLAPSING)
    records = lines(run / "policies.jsonl")
    collapsed = [record["step"] for record in records if has_collapsed(record)]
    assert 3 < len(collapsed) < len(records) == 12, "it starts well, and then collapses"
    assert collapsed == list(range(collapsed[0], 13)), "and stays so"
    assert [record["step"] for record in records if record["collapsed"]] == collapsed
    assert curve(run, "adversary/collapsed") == {r["step"]: float(r["step"] in collapsed) for r in records}
    first = records[collapsed[0] - 1]
    assert out.count("has collapsed") == 1
    assert f"after step {first['step']} the controller has collapsed: {first['collapsed']}\n" in out
    closing = f"The controller collapsed: in {len(collapsed)} intervals, first after step {collapsed[0]};"
    assert closing in out

    run_and_output("parts", *COLLAPSING, "--stop_epoch=2")
    parts, out = run_and_output("parts", *COLLAPSING, "--resume")
    assert closing in out, "all intervals of the run, not those since it was resumed"
    assert files(parts) == files(run)
    assert same(final_state(parts), final_state(run))


def test_a_collapse_after_a_recovery_is_reported_again(run_and_output, monkeypatch):
    messages = iter([None, "first", "first", None, "first", "other", None, None, None, "last", None, None])
    monkeypatch.setattr(manager, "collapse_message", lambda *_: next(messages))
    run, out = run_and_output("again", "policy_interval=1")
    assert [line for line in out.splitlines() if "has collapsed" in line] == [
        f"after step {step} the controller has collapsed: {message}"
        for step, message in ((2, "first"), (5, "first"), (10, "last"))
    ]
    assert "collapsed: in 5 intervals, first after step 2;" in out
    assert final_state(run)["collapse"] == list(CollapseCount(5, 2))


def test_a_collapse_is_judged_by_the_settings_of_the_run(run_and_output):
    settings = ("M=3", "Q=2", "K=4", "levels=7", "ops=[Rotate, Invert]", "collapse_entropy=1", "logit_bound=0")
    run, _ = run_and_output("settings", *settings, "--stop_epoch=1")
    (record,) = lines(run / "policies.jsonl")
    largest = 8 * (math.log(2) + math.log(7))
    assert record["entropy"] < largest
    assert record["collapsed"] == f"its entropy is {record['entropy']:.2f} of {largest:.2f} nats"


def test_policies_that_do_not_learn_do_not_collapse(run_and_output, monkeypatch):
    monkeypatch.setattr(manager, "collapse_message", lambda *_: "always")
    run, out = run_and_output("control", "policy=random", "policy_interval=1", "--stop_epoch=1")
    assert {record["collapsed"] for record in lines(run / "policies.jsonl")} == {None}
    assert "collapse" not in out
    assert set(curve(run, "adversary/collapsed").values()) == {0.0}


def test_a_controller_that_is_held_does_not_collapse(run_and_output, monkeypatch):
    monkeypatch.setattr(manager, "collapse_message", lambda *_: "always")
    for floor, expected in ((0.3, None), (0.2, "always")):
        run, _ = run_and_output(f"at_{floor}", f"entropy_floor={floor}", "policy_interval=1", "--stop_epoch=1")
        assert {record["collapsed"] for record in lines(run / "policies.jsonl")} == {expected}
