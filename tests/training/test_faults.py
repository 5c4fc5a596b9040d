"""Runs in which a loss, a gradient or a weight is not finite: they stop or are rewound, and save no such number."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LITTLE, TINY, assert_refused, files, final_state, lines, little_network, same, scripts_on_ranks
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

import main
import policies.learned as learned
from training.distributed import digest
from utils import load_tensors

NAN, INF = math.nan, math.inf
REWIND = "on_nonfinite=rewind"


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)


class Fault:
    """Spoils steps that are `due`, `times` at most.

    what: "loss" of one policy's copies, and with it the gradient; "gradient" alone; a "weight" or a "buffer" after the
    step. due: of the state in a step. inputs: digests of the network's inputs, with epoch and step, in order.
    """

    def __init__(self, monkeypatch, what, due, *, times=1, value=NAN):
        self.what, self.due, self.left, self.value = what, due, times, value
        self.state, self.inputs = None, []
        self._learn, self._descend, self._cross_entropy = main.learn, main.descend, F.cross_entropy
        monkeypatch.setattr(main, "learn", self.learn)
        monkeypatch.setattr(main, "descend", self.descend)
        monkeypatch.setattr(F, "cross_entropy", self.cross_entropy)

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
            factor_B.view(-1, self.state.config.M)[:, 1] = self.value
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


def command(tmp_path, name, *arguments):
    flags = [word for word in arguments if word.startswith("-")]
    overrides = [word for word in arguments if not word.startswith("-")]
    return "main.py", "--logdir", tmp_path, "--name", name, *flags, "--set", *TINY, *LITTLE, "M=3", *overrides


def positions(run):
    return sorted(tuple(map(int, file.name.split("-")[1:4:2])) for file in (run / "checkpoints").iterdir())


def rewinds(run):
    return [incident["rewind"] for incident in lines(run / "incidents.jsonl")]


def assert_finite(run):
    """Every number in every checkpoint, and in model.pt."""

    def check(value):
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all()
        elif isinstance(value, float):
            assert math.isfinite(value)
        elif isinstance(value, (dict, list, tuple)):
            for item in value.values() if isinstance(value, dict) else value:
                check(item)

    for file in [*(run / "checkpoints").iterdir(), *run.glob("model.pt")]:
        check(load_tensors(file))


def shown(run, tag):
    """[(step, value)] of what TensorBoard shows; steps that were rewound are not."""
    board = plugin_event_accumulator.EventAccumulator(str(run)).Reload()
    return [(event.step, tensor_util.make_ndarray(event.tensor_proto).reshape(-1)[0]) for event in board.Tensors(tag)]


def assert_same_run(run, truth):
    """All results, but for the count of rewinds."""
    assert files(run) == files(truth)
    assert same(*(final_state(one) | {"rewinds": 0} for one in (run, truth)))
    assert same(*(load_tensors(one / "model.pt") for one in (run, truth)))


@pytest.mark.parametrize(
    ("what", "value", "settings", "where", "last"),
    [
        ("loss", NAN, ("accumulate=2",), "the loss is no longer finite in epoch 2, step 3 (process 0; policy", (1, 0)),
        ("loss", INF, ("checkpoint_every=1",), "the loss is no longer finite in epoch 2, step 3 (process 0; ", (1, 2)),
        ("loss", NAN, ("policy_interval=1",), "the loss is no longer finite in epoch 2, step 3 (process 0; ", (1, 0)),
        ("gradient", INF, ("grad_clip=1",), "the gradient is no longer finite in epoch 2, step 3 (process 0)", (1, 0)),
        ("weight", INF, (), " is no longer finite in epoch 2, step 4 (process 0", (1, 0)),
        ("buffer", NAN, ("policy=none",), "the network is no longer finite in epoch 2, step 4 (process 0)", (1, 0)),
    ],
)  # fmt: skip
def test_a_fault_stops_the_run_and_resuming_is_exact(script, tmp_path, monkeypatch, what, value, settings, where, last):
    """In the third step of the second epoch. The policies in use are printed and recorded."""
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
    printed = done.out.split("with these policies in use:\n")[1].splitlines()
    for number, (line, policy) in enumerate(zip(printed, incident["policies"], strict=True), start=1):
        assert line.startswith(f"  {number}. ")
        assert all(name in line for pairs in policy for name, _ in pairs)
    assert positions(run)[-1] == last
    assert_finite(run)

    assert script(*command(tmp_path, "faulty", "--resume", *settings)).status == 0
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.parametrize(("what", "step"), [("loss", 1), ("gradient", 3), ("weight", 1), ("buffer", 3)])
def test_a_fault_in_the_step_before_a_save_is_not_saved(script, tmp_path, monkeypatch, what, step):
    """In the middle of an epoch, and at its end, when model.pt is written as well."""
    Fault(monkeypatch, what, at(1, step))
    done = script(*command(tmp_path, "run", "checkpoint_every=2", "policy_interval=12"))
    assert_refused(done, f" is no longer finite in epoch 2, step {step + 1} (process 0")
    assert positions(tmp_path / "run")[-1] == (1, step - 1)
    assert_finite(tmp_path / "run")
    assert load_tensors(tmp_path / "run" / "model.pt")["epoch"] == 1


@pytest.mark.parametrize(
    ("what", "place", "settings", "back"),
    [
        ("loss", (1, 2), ("policy_interval=3", "controller_lr=0.05", "checkpoint_every=2"), "epoch 2, step 3"),
        pytest.param("gradient", (0, 0), (), "epoch 1, step 1", marks=pytest.mark.slow),
        pytest.param("weight", (1, 2), ("checkpoint_every=1",), "epoch 2, step 3", marks=pytest.mark.slow),
        pytest.param("buffer", (1, 2), ("policy_interval=5",), "epoch 2, step 1", marks=pytest.mark.slow),
    ],
)
def test_a_rewound_fault_that_passes_changes_no_result(script, tmp_path, monkeypatch, what, place, settings, back):
    """Except for incidents.jsonl, its text in TensorBoard and the count of rewinds."""
    assert script(*command(tmp_path, "whole", REWIND, *settings)).status == 0
    Fault(monkeypatch, what, at(*place))
    done = script(*command(tmp_path, "faulty", REWIND, *settings))
    run = tmp_path / "faulty"
    assert done.status == 0, done.err
    assert f"\nback to {back} (1 of 2 rewinds)\n" in done.out
    assert "The run was rewound once after a number that was not finite; see incidents.jsonl." in done.out
    assert rewinds(run) == [1]
    assert [line["epoch"] for line in lines(run / "times.jsonl")] == [1, 2, 3]
    assert_same_run(run, tmp_path / "whole")
    assert final_state(run)["rewinds"] == 1
    for tag in ("adversary/entropy_share", "loss/train"):
        assert len(shown(run, tag)) == len(lines(run / ("metrics.jsonl" if tag == "loss/train" else "policies.jsonl")))
        assert shown(run, tag) == shown(tmp_path / "whole", tag)
    ((_, text),) = shown(run, "incidents/text_summary")
    assert text.decode().startswith(f"{lines(run / 'incidents.jsonl')[0]['incident']} in epoch ")


@pytest.mark.slow
def test_the_second_rewind_changes_the_draws(script, tmp_path, monkeypatch):
    """The fault depends on the network's inputs in step 3 of the second epoch."""
    fault = Fault(monkeypatch, "loss", None, times=99)
    fault.due = lambda state: fault.inputs[-1] == next((shown for shown in fault.inputs if shown[0] == (1, 2)), None)
    done = script(*command(tmp_path, "recurring", REWIND, "policy_interval=3"))
    assert done.status == 0, done.err
    for place in ((1, 0), (1, 2)):  # from the checkpoint on
        first, second, third = (inputs for shown, inputs in fault.inputs if shown == place)
        assert first == second != third
    run = tmp_path / "recurring"
    assert rewinds(run) == [1, 2]
    assert "(2 of 2 rewinds)" in done.out
    assert "The run was rewound 2 times" in done.out
    assert [line["epoch"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert_finite(run)


def test_the_third_fault_stops_the_run_also_when_resumed(script, tmp_path, monkeypatch):
    Fault(monkeypatch, "loss", at(1, 2), times=99)
    done = script(*command(tmp_path, "run", REWIND))
    assert_refused(done, "the loss is no longer finite in epoch 2, step 3", "after 2 rewinds", "lower lr")
    assert rewinds(tmp_path / "run") == [1, 2, None]
    assert positions(tmp_path / "run")[-1] == (1, 0)
    assert_finite(tmp_path / "run")
    assert_refused(script(*command(tmp_path, "run", REWIND, "--resume")), "after 2 rewinds")
    assert rewinds(tmp_path / "run") == [1, 2, None, None]


@pytest.mark.parametrize(("value", "again"), [(NAN, ", after 2 rewinds"), (1e30, "")])
def test_a_controller_that_is_not_finite_ends_the_run(script, tmp_path, monkeypatch, value, again):
    """By its weights, or by what follows from them in the next interval."""
    reinforce = learned.reinforce

    def spoilt(controller, *arguments, **options):
        result = reinforce(controller, *arguments, **options)
        with torch.no_grad():
            for parameter in controller.parameters():
                parameter.copy_(value * parameter.sign())
        return result

    monkeypatch.setattr(learned, "reinforce", spoilt)
    settings = ("policy_interval=1", "logit_bound=0", *((REWIND,) if again else ()))
    done = script(*command(tmp_path, "run", *settings))
    assert_refused(done, f"the controller is no longer finite in epoch 1, step 1{again}; earlier checkpoints are kept")
    assert_finite(tmp_path / "run")
    assert rewinds(tmp_path / "run") == ([1, 2, None] if again else [None])
    assert lines(tmp_path / "run" / "incidents.jsonl")[-1]["processes"] == [], "the same in all"


# Several processes


def run_on_ranks(tmp_path, name, *arguments):
    ranks = scripts_on_ranks(2, *command(tmp_path, name, *arguments))
    assert not ranks[1].out, "only the main process prints"
    return ranks


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("loss", "the loss is no longer finite in epoch 2, step 3 (process 1; policy 2)"),
        ("gradient", "the gradient is no longer finite in epoch 2, step 3 (process 0, 1)"),
        ("buffer", "the network is no longer finite in epoch 2, step 4 (process 1)"),
    ],
)
def test_all_processes_stop_for_the_fault_of_one(tmp_path, monkeypatch, what, where):
    Fault(monkeypatch, what, at(1, 2, rank=1))
    ranks = run_on_ranks(tmp_path, "run")
    assert [rank.status for rank in ranks] == [2, 2]
    err = "".join(rank.err for rank in ranks)
    assert where in err
    assert len(err.splitlines()) == 2, err
    assert positions(tmp_path / "run")[-1] == (1, 0)
    assert_finite(tmp_path / "run")


@pytest.mark.slow
def test_all_processes_are_rewound_for_the_fault_of_one(tmp_path, monkeypatch):
    settings = (REWIND, "checkpoint_every=1", "policy_interval=3", "controller_lr=0.05")
    run_on_ranks(tmp_path, "whole", *settings)
    Fault(monkeypatch, "gradient", at(1, 2, rank=1))
    ranks = run_on_ranks(tmp_path, "faulty", *settings)
    assert [rank.status for rank in ranks] == [0, 0], ranks
    assert "(1 of 2 rewinds)" in ranks[0].out
    assert rewinds(tmp_path / "faulty") == [1]
    assert_same_run(tmp_path / "faulty", tmp_path / "whole")


def test_a_rewind_after_an_elastic_resumption(script, tmp_path, monkeypatch):
    """It ignores the later checkpoint of two processes, which one process cannot use."""
    with monkeypatch.context() as patched:
        Fault(patched, "loss", at(1, 3))
        run_on_ranks(tmp_path, "run", "checkpoint_every=3")
    assert positions(tmp_path / "run") == [(1, 0), (1, 3)]
    Fault(monkeypatch, "loss", at(1, 1))
    done = script(*command(tmp_path, "run", REWIND, "checkpoint_every=3", "--resume-elastic"))
    assert done.status == 0, done.err
    assert "back to epoch 2, step 1 (1 of 2 rewinds)" in done.out
    assert [line["epoch"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
