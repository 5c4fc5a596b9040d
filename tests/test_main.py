"""Whole runs: the same seed gives the same bits, a resumed run equals an uninterrupted one, mistakes lose nothing."""

import itertools
import math
import shutil

import pytest
import torch
from conftest import ALONE, TINY, Unkept, assert_refused, files, final_state, lines, same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import training.state as trainingstate
from augmentations import OPS, row_of
from config import Config, load_config
from dataloader import Normalise, epoch_batches
from datasets.splits import ResidentSplit
from evaluation.predict import full_float32, score
from models import build_model
from policies.sources import RandomPolicies
from training.checkpoint import Checkpoints
from training.log import labelled_rows
from utils import choose_kernels, keyed_generator, load_tensors

# Noise in the network, and intervals that end in the middle of epochs (4 steps each): state that is easily lost.
REFERENCE = []
DEMANDING = ("dropout=0.1", "policy_interval=3", "controller_lr=0.05")


@pytest.fixture
def reference(train, tmp_path_factory):
    """An uninterrupted run, trained once for all tests."""
    if not REFERENCE:
        REFERENCE.append(
            shutil.copytree(train("reference", *DEMANDING), tmp_path_factory.mktemp("whole") / "reference")
        )
    return REFERENCE[0]


def test_same_seed_same_bits_and_another_seed_others(train, reference):
    again, other = train("again", *DEMANDING), train("other", *DEMANDING, "seed=1")
    assert files(again) == files(reference)
    assert same(final_state(again), final_state(reference))
    for ours, theirs in zip(files(other), files(reference), strict=True):
        assert ours != theirs
    assert not same(final_state(other)["model"], final_state(reference)["model"])


def test_a_resumed_run_is_the_uninterrupted_one(train, reference):
    train("resumed", *DEMANDING, "--stop_epoch=1")
    train("resumed", *DEMANDING, "--resume", "--stop_epoch=2")
    resumed = train("resumed", *DEMANDING, "--resume")
    assert files(resumed) == files(reference)
    assert same(final_state(resumed), final_state(reference))
    assert same(load_tensors(resumed / "model.pt")["model"], final_state(reference)["model"])


def test_lines_written_after_the_checkpoint_are_not_doubled(train, reference):
    run = train("torn", *DEMANDING, "--stop_epoch=2")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "half a li')
    assert files(train("torn", *DEMANDING, "--resume")) == files(reference)


def test_a_damaged_checkpoint_is_skipped(train, reference, script, tmp_path):
    run = train("damaged", *DEMANDING, "--stop_epoch=2")
    newest = max((run / "checkpoints").iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    settings = ("--logdir", tmp_path, "--name", "damaged", "--set", *TINY, *DEMANDING)
    done = script("main.py", "--resume", *settings)
    assert done.status == 0
    assert f"warning: {newest}: is damaged" in done.err
    assert files(run) == files(reference)


def test_a_run_killed_before_its_first_checkpoint_starts_over(train, reference):
    run = train("early", *DEMANDING, "--stop_epoch=1")
    for left in (*(run / "checkpoints").iterdir(), *run.glob("*.jsonl"), run / "model.pt"):
        left.unlink()
    assert files(train("early", *DEMANDING, "--resume")) == files(reference)


def test_a_run_without_its_checkpoints_does_not_start_over(train, script, tmp_path):
    run = train("emptied", "--stop_epoch=1")
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.rename(run / "checkpoints" / f"another version's {checkpoint.name}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = script("main.py", "--resume", "--logdir", tmp_path, "--name", "emptied", "--set", *TINY)
    assert_refused(refused, f"{run}: has finished epochs, but no checkpoint of this version", "--overwrite")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_finished_run_is_resumed_without_effect(train, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "finished")
    assert files(train("finished", *DEMANDING, "--resume")) == files(reference)


@pytest.mark.parametrize("policy", ["controller", "random", "none"])
def test_what_a_run_directory_holds(train, policy):
    run = train("kept", f"policy={policy}", "eval_every=1")
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    assert names == {
        "config.yaml", "environment.json", "metrics.jsonl", "times.jsonl", "policies.jsonl", "checkpoints", "model.pt"
    }  # fmt: skip
    assert len(list((run / "checkpoints").iterdir())) == 2
    metrics, policies = lines(run / "metrics.jsonl"), lines(run / "policies.jsonl")
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    assert metrics[0].keys() == {
        "epoch", "step", "lr", "train_loss", "train_top1", "test_loss", "test_top1", "test_top1_best_seen",
        "entropy", "loss_spread",
    }  # fmt: skip
    best = list(itertools.accumulate((line["test_top1"] for line in metrics), max))
    assert [line["test_top1_best_seen"] for line in metrics] == best
    assert [line["interval"] for line in policies] == [0, 1, 2]
    for line, interval in zip(metrics, policies, strict=True):
        assert line["train_loss"] == pytest.approx(sum(interval["losses"]) / 2, rel=1e-5), "all steps, both policies"
        assert len(interval["policies"]) == len(interval["losses"]) == len(interval["advantages"]) == 2
        assert sum(interval["advantages"]) == pytest.approx(0, abs=1e-6)
    assert {line["epoch"] for line in lines(run / "times.jsonl")} == {1, 2, 3}


def test_tensorboard_shows_curves_shares_and_images(train):
    run = train("board", "eval_every=1", "entropy_floor=0.9")
    board = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    tags = board.Tags()
    assert [event.value for event in board.Scalars("adversary/entropy_floor")] == pytest.approx([0.9] * 3)
    curves = {"accuracy/train", "accuracy/test", "loss/train", "loss/test", "run/lr", "run/copies_per_second"}
    assert curves | {"adversary/entropy_share", "adversary/loss_spread", "adversary/collapsed"} <= set(tags["scalars"])
    assert len(tags["scalars"]) == len(curves) + 4 + 1 + 16 + 10, "and the best accuracy seen; nothing twice"
    assert sum(board.Scalars(f"operations/{op.name}")[0].value for op in OPS[:16]) == pytest.approx(1)
    assert sum(board.Scalars(f"levels/{level}")[0].value for level in range(10)) == pytest.approx(1)
    metrics, largest = lines(run / "metrics.jsonl"), 10 * (math.log(16) + math.log(10))
    assert [event.value for event in board.Scalars("loss/train")] == pytest.approx([m["train_loss"] for m in metrics])
    shares = [line["entropy"] / largest for line in lines(run / "policies.jsonl")]
    assert [event.value for event in board.Scalars("adversary/entropy_share")] == pytest.approx(shares)
    image = board.Images("policies")[0]
    assert image.width == 8 * 98, "eight images, enlarged threefold"
    assert image.height > 2 * 96, "two policies with their labels"


def test_pictures_of_policies_are_labelled():
    images = torch.full((2, 3, 3, 32, 32), 200, dtype=torch.uint8)
    picture = labelled_rows(images, ["Rotate 3", "x " * 200])
    assert picture.shape[0] == 3
    assert picture.shape[2] == 3 * 98
    dark = (picture < 100).any(0).any(1)
    assert dark[:14].any(), "the first label"
    assert not dark[16:100].any(), "the first row of images"
    assert dark[110:].any(), "the second label"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("controller_lr=1", "policy_interval=1", "logit_bound=1"), ["The controller has moved: "]),
        ((), ["The controller has not moved yet: 100.0 % of its maximal entropy is left"]),
        (("policy=random",), []),
    ],
)
def test_a_run_says_what_it_trains_and_what_the_adversary_did(script, tmp_path, settings, words):
    done = script("main.py", "--logdir", tmp_path, "--name", "run", "--set", *TINY, *settings)
    first, second, *epochs = done.out.splitlines()[:5]
    assert first == "wresnet10_1 on shapes (40 training and 2,000 test images of 10 classes), cpu"
    assert f"M = 2, 3 epochs; run directory {tmp_path / 'run'}" in second
    learns = "policy=random" not in settings
    assert all((", entropy " in line) == learns and "copies/s" in line for line in epochs)
    closing = done.out.split("Finished 3 of 3 epochs")[1]
    assert all(word in closing for word in words), closing
    assert ("The controller" in closing) == ("--set policy=random" in closing) == learns
    assert all(name in closing for name in ("evaluate.py --checkpoint", "report.py", "tensorboard", "--resume"))


def test_a_single_policy_trains_without_a_controller_step(train):
    run = train("single", "M=1", "controller_lr=1000")
    for line in lines(run / "metrics.jsonl") + lines(run / "policies.jsonl"):
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, (int, float))), line
    assert [line["advantages"] for line in lines(run / "policies.jsonl")] == [[0.0]] * 3
    assert final_state(run)["policies"]["optimizer"]["state"] == {}


def state_for(config, policies=None, model=None):
    torch.manual_seed(0)
    state = trainingstate.TrainingState.start(config, ALONE, model or build_model(config.model, 10))
    state.policies = policies or state.policies
    return state


@pytest.mark.parametrize("destroyer", [0, 2])
def test_rewards_belong_to_the_policies_that_caused_them(destroyer):
    """Classes are brightnesses; one policy dims them to a tenth, twice, the others leave them be."""
    config = Config(model="wresnet10_1", batch_size=20, M=4, epochs=12, lr=0.05, cutout=0, crop_padding=0)
    labels = torch.arange(100) % 10
    images = (labels * 25).to(torch.uint8)[:, None, None, None].expand(100, 3, 16, 16).contiguous()
    policies = RandomPolicies(config.M, config.Q, config.K, ("Brightness", "Solarize"))
    neutral = torch.tensor([row_of("Solarize"), row_of("Solarize")])

    def fixed(*_):
        policies.op_MQK[:], policies.level_MQK[:] = neutral, 9
        policies.op_MQK[destroyer], policies.level_MQK[destroyer] = row_of("Brightness"), 0

    policies._sample = fixed
    policies.op_MQK = torch.zeros_like(policies.op_MQK)
    state = state_for(config, policies)
    split = ResidentSplit(images, labels)
    for _ in range(config.epochs):
        metrics = main.train_one_epoch(state, split, manager := Unkept())
        state.end_epoch()
    (record,) = manager.intervals
    losses = record["losses"]
    assert losses.index(max(losses)) == destroyer
    assert max(losses) > 1.5 * sorted(losses)[-2]
    assert record["advantages"].index(max(record["advantages"])) == destroyer
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


class Recorder(torch.nn.Module):
    """A linear network that keeps what it is shown and what it answers."""

    def __init__(self, pixels):
        super().__init__()
        self.linear = torch.nn.Linear(pixels, 10)
        self.seen, self.answers = [], []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        self.answers.append(self.linear(x.flatten(1)))
        return self.answers[-1]


PLAIN = {"model": "wresnet10_1", "epochs": 1, "cutout": 0, "crop_padding": 0, "flip": False, "policy": "none"}


def small_set(count, seed=0, side=8):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (count, 3, side, side), dtype=torch.uint8, generator=g)
    return ResidentSplit(images, torch.arange(count) % 10)


def test_steps_are_those_of_sgd_on_the_mean_loss_of_all_copies():
    """Two steps by hand: Nesterov's momentum, weight decay, smoothed labels, the schedule, M equal copies."""
    config = Config(**PLAIN, batch_size=8, M=2, lr=0.5, momentum=0.8, weight_decay=0.01, label_smoothing=0.2)
    split = small_set(16)
    model = Recorder(192)
    weight, bias = (p.detach().clone().double() for p in model.linear.parameters())
    metrics = main.train_one_epoch(state_for(config, model=model), split, Unkept())

    losses, momenta = [], None
    for step, index in enumerate(epoch_batches(16, 8, config.seed, 0)):
        weight.requires_grad_()
        bias.requires_grad_()
        inputs = Normalise(config, torch.device("cpu"))(split.images[index]).double().flatten(1)
        log_p = (inputs @ weight.T + bias).log_softmax(1)
        target = torch.full((8, 10), 0.02, dtype=torch.float64)
        target[torch.arange(8), split.labels[index]] += 0.8
        loss = -(target * log_p).sum(1).mean()
        gradients = torch.autograd.grad(loss, (weight, bias))
        losses.append(loss.item())
        with torch.no_grad():
            gradients = [g + 0.01 * p for g, p in zip(gradients, (weight, bias), strict=True)]
            momenta = [0.8 * v + g for v, g in zip(momenta, gradients, strict=True)] if momenta else gradients
            lr = 0.5 * 0.5 * (1 + math.cos(math.pi * step / 2))
            moves = [lr * (g + 0.8 * v) for g, v in zip(gradients, momenta, strict=True)]
            weight, bias = (p - move for p, move in zip((weight, bias), moves, strict=True))
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    torch.testing.assert_close(model.linear.weight.detach().double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.linear.bias.detach().double(), bias, atol=1e-5, rtol=1e-4)


def test_every_image_is_seen_once_per_policy_with_its_own_cutout():
    config = Config(**PLAIN | {"cutout": 4}, batch_size=10, M=3)
    split, model = small_set(10), Recorder(192)
    main.train_one_epoch(state_for(config, model=model), split, Unkept())
    (seen,) = model.seen
    (order,) = epoch_batches(10, 10, config.seed, 0)
    plain = Normalise(config, torch.device("cpu"))(split.images[order]).repeat_interleave(3, 0)
    blank = (seen == 0).all(1)
    assert torch.equal(seen, plain.masked_fill(blank[:, None], 0))
    sizes = blank.sum((1, 2))
    assert sizes.min() > 0
    assert sizes.max() == 16
    assert len({mask.numpy().tobytes() for mask in blank}) > 15, "drawn for each copy"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_fused_step_that_the_scaler_skips_leaves_no_trace(momentum):
    """CUDA's optimizer, which the CPU has as well: an overflow in the first step, then gradients of 1."""
    config = Config(momentum=momentum, nesterov=momentum > 0, weight_decay=0.0, lr=0.5)
    ends = []
    for fused in (True, False):
        model = torch.nn.Linear(50, 50)
        torch.nn.init.zeros_(model.weight)
        torch.full((5, 50, 50), math.nan)  # what the memory that comes next is full of
        optimizer, scaler = (
            trainingstate.build_optimizer(model, config, fused=fused),
            torch.amp.GradScaler("cpu", init_scale=4.0),
        )
        for gradient in (math.inf, 1.0, 1.0):
            optimizer.zero_grad()
            scaler.scale((gradient * model.weight).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(model.weight.detach())
    torch.testing.assert_close(ends[0], ends[1])
    assert (ends[0] < 0).all()


def test_a_resumed_optimizer_stays_as_fused_as_its_device_has_it(train):
    run = train("fused", "--stop_epoch=1")
    saved = Checkpoints(run / "checkpoints").load_newest(pytest.fail)
    assert saved["optimizer"]["param_groups"][0]["fused"] is None
    config = load_config(run / "config.yaml", {})
    state = trainingstate.TrainingState.start(config, ALONE, build_model(config.model, 10))
    state.optimizer = trainingstate.build_optimizer(state.model, config, fused=True)
    state.load_state_dict(saved, run)
    assert [group["fused"] for group in state.optimizer.param_groups] == [True]


def kernels():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, cudnn.deterministic


@pytest.mark.parametrize("tf32", [True, False])
def test_scores_are_in_float32_whatever_the_training_is_in(tf32):
    before = kernels()
    try:
        choose_kernels(torch.device("cuda"), False, tf32)
        assert kernels() == (tf32, tf32, True, False)
        seen, model = [], Recorder(192)
        model.linear.register_forward_hook(lambda *_: seen.append(kernels()))
        config = Config(**PLAIN)
        score(model, small_set(20), 10, Normalise(config, torch.device("cpu")), ALONE)
        assert seen == [(False, False, False, True)]
        assert kernels() == (tf32, tf32, True, False)
        with pytest.raises(ZeroDivisionError), full_float32():
            raise ZeroDivisionError
        assert kernels() == (tf32, tf32, True, False)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark, _ = (
            before
        )


@pytest.mark.parametrize(("amp", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_mixed_precision_is_that_of_the_forward_pass(amp, dtype):
    config = Config(**PLAIN, batch_size=10, M=2, amp=amp)
    model = Recorder(192)
    metrics = main.train_one_epoch(state_for(config, model=model), small_set(10), Unkept())
    assert {answer.dtype for answer in model.answers} == {dtype}
    assert model.linear.weight.dtype == torch.float32
    assert math.isfinite(metrics["train_loss"])


@pytest.mark.parametrize(("policy", "interval"), [("controller", "3"), ("none", "null")])
def test_a_loss_that_is_not_finite_ends_the_run_state_kept(script, tmp_path, policy, interval):
    said = (
        "--logdir",
        tmp_path,
        "--name",
        "diverged",
        "--set",
        *TINY,
        f"policy={policy}",
        f"policy_interval={interval}",
    )
    exploding = ("schedule=step", "milestones=[2]", "gamma=1e9")
    words = ("diverged: the ", " is no longer finite in epoch 3, step ", "lower lr")
    assert_refused(script("main.py", *said, *exploding), *words)
    run = tmp_path / "diverged"
    assert final_state(run)["epoch"] == len(lines(run / "metrics.jsonl")) == 2
    assert all(value.isfinite().all() for value in final_state(run)["model"].values())
    assert_refused(script("main.py", "--resume", *said, *exploding), *words)


def test_learning_rates_follow_their_formulas():
    cosine = Config(lr=0.4, epochs=10)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=70)
    for step in range(70):
        assert main.learning_rate(cosine, step, 7) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        reference.step()
        schedule.step()
    warm = Config(lr=0.4, epochs=10, warmup_epochs=2)
    rates = [main.learning_rate(warm, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.04 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert rates[30] == pytest.approx(0.2)
    assert rates == rates[:10] + sorted(rates[10:], reverse=True)


def test_gradients_are_clipped_to_the_norm(train):
    steps = []
    for clip in (0.0, 1e-6):
        run = train(f"clip{clip}", f"grad_clip={clip}", "epochs=1", "weight_decay=0", "momentum=0", "nesterov=false")
        torch.manual_seed(keyed_generator(0, "network").initial_seed())
        start = build_model("wresnet10_1", 10).state_dict()
        end = load_tensors(run / "model.pt")["model"]
        moved = [(end[name] - start[name]).flatten() for name in start if "weight" in name]
        steps.append(torch.cat(moved).norm().item())
    assert steps[0] > 0.01
    assert 0 < steps[1] <= 4 * 0.1 * 1e-6 * 1.01, "four steps of at most lr * clip"
