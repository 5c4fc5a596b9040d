"""Score a model on every image of a split: for the log during training, and for evaluate.py.

Shape suffixes: B images of a batch, I of a split; C, H, W as usual, but for logits_BC, where C counts classes.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dataloader import Normalise
from datasets.splits import Readable
from evaluation.metrics import Predictions, Scores
from training.distributed import World
from utils import duration

BATCH = 256  # images in a forward pass; does not influence the counts


def score(
    model: nn.Module,
    split: Readable,
    num_classes: int,
    normalise: Normalise,
    world: World,
    stopped: Callable[[], bool] = lambda: False,
) -> Scores:
    """Score `model` in float32 on every image of `split`. stopped: see `predict`."""
    return Scores.of(predict(model, split, normalise, world, stopped=stopped), num_classes)


@torch.no_grad()
def predict(
    model: nn.Module,
    split: Readable,
    normalise: Normalise,
    world: World,
    *,
    batch: int | None = None,
    bfloat16: bool = False,
    progress: Callable[[int], None] = lambda _images: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Predictions:
    """Predictions of `model`, in evaluation mode, for every image of `split`; the model's mode is restored.

    The processes take the batches in turn. All batches have one shape, the last one filled up with images that do not
    count, and results are ordered by image: they are the same for any number of processes.

    batch: images in a forward pass (default: BATCH). bfloat16: mixed precision instead of float32. progress: called
    with the number of images done, after each batch. stopped: called before each batch; once it returns True, this
    process stops predicting, and the returned predictions are incomplete.
    """
    was_training = model.training
    model.eval()
    batches = torch.arange(len(split.labels)).split(batch or BATCH)
    size = len(batches[0])
    own_batches = batches[world.rank :: world.size]
    precision = torch.autocast(world.device.type, torch.bfloat16) if bfloat16 else nullcontext()
    results_I4 = torch.zeros(len(split.labels), 4, dtype=torch.float64, device=world.device)
    for index, (images_BCHW, label_B) in zip(own_batches, split.batches(own_batches), strict=True):
        if stopped():
            break
        filled_BCHW = torch.cat((images_BCHW, images_BCHW[:1].expand(size - len(index), -1, -1, -1)))
        inputs_BCHW = normalise(filled_BCHW)
        with full_float32(), precision:
            # forward() itself: a compiled network is scored uncompiled, without compiling it again for this
            logits_BC = model.forward(inputs_BCHW)[: len(index)].float()
        top_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
        confidence_B = logits_BC.softmax(1).amax(1)
        loss_B = F.cross_entropy(logits_BC, label_B, reduction="none", ignore_index=-1)
        in_top5_B = (top_B5 == label_B[:, None]).any(1)
        results_B4 = torch.stack((top_B5[:, 0].double(), confidence_B.double(), loss_B.double(), in_top5_B), dim=1)
        results_I4[index[0] : index[-1] + 1] = results_B4
        progress(world.size * len(index))
    model.train(was_training)
    predicted_I, confidence_I, loss_I, in_top5_I = world.sum(results_I4).cpu().unbind(1)
    return Predictions(split.labels, predicted_I.long(), confidence_I, loss_I, in_top5_I.bool())


@contextmanager
def full_float32() -> Iterator[None]:
    """On CUDA, full float32 precision and deterministic kernels, whatever was chosen for training."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


class ImageProgress:
    """Progress over many images, with time left: a bar on a terminal, else a line on stderr twice a minute at most.

    shown: False for a process that must not print.
    """

    def __init__(self, images: int, *, shown: bool = True):
        self._started = self._printed_at = time.monotonic()
        self._prints = shown
        self._done, self._images, self._doing = 0, images, ""
        self._bar = tqdm(total=images, unit="image", leave=False, disable=None if shown else True, dynamic_ncols=True)

    def begin(self, doing: str) -> None:
        self._doing = doing
        self._bar.set_description(doing)

    def update(self, images: int) -> None:
        self._done = min(self._done + images, self._images)
        self._bar.update(self._done - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and self._prints and now - self._printed_at > 30:
            left = duration((now - self._started) / self._done * (self._images - self._done))
            print(f"{self._doing}: {self._done:,} of {self._images:,} images, {left} left", file=sys.stderr, flush=True)
            self._printed_at = now

    def close(self) -> None:
        self._bar.close()
