"""A network and a recipe without random draws, for runs that must agree however many processes share them."""

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from strassen_tile import STLConfig, STLLinear
from strassen_tile.data import ImageSplits, collate, load_images
from strassen_tile.data.images import InMemoryImages
from strassen_tile.integrations.images import train_images
from strassen_tile.integrations.training import ImageTraining
from strassen_tile.models import t2t_vit

TRAINING = ImageTraining(epochs=2, batch_size=16, lr=3e-3, warmup=0.25, precision="float32")


def splits(limit: int) -> ImageSplits:
    """Of the images to test on, enough for a batch and a part of one: two processes have 64 at once."""
    data = load_images("digits", limit=limit, augment=False)
    few = InMemoryImages(data.test.images[:83], data.test.labels[:83], mean=data.test.mean, std=data.test.std)
    return replace(data, test=few)


def few_images(folder: Path, images: ImageSplits, *, train: int, test: int) -> None:
    """An IDX folder of the first of them, for commands: these test on all there are."""
    folder.mkdir()
    for part, data, count in (("train", images.train, train), ("t10k", images.test, test)):
        for name, code, array in (("images-idx3", 3, data.images[:count, 0]), ("labels-idx1", 1, data.labels[:count])):
            header = bytes([0, 0, 8, code]) + struct.pack(f">{code}I", *array.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + array.to(torch.uint8).numpy().tobytes())


def network() -> nn.Module:
    """Its layers are put in by hand: for `convert` to find out which rows may mix takes seconds, in every process."""
    torch.manual_seed(5)
    model = t2t_vit("t2t_vit_micro", num_classes=10, image_size=8, in_channels=1)
    linear = [name for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]
    for name in linear:
        layer = STLLinear.from_linear(model.blocks.get_submodule(name), STLConfig(rank=8, init="random"))
        model.blocks.set_submodule(name, layer)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def spoilt_at(step: int, value: float) -> tuple[nn.Module, list[int]]:
    """A network whose outputs are `value` in training step `step`, and a list that grows with each step."""
    model, steps = network(), []

    def spoil(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        if module.training:
            steps.append(len(steps) + 1)
        return output * value if module.training and steps[-1] == step else output

    model.register_forward_hook(spoil)
    return model, steps


def exact_network() -> nn.Module:
    """The network in float64, but for its loss: what differs in another order of summation is then far below what is wrong."""
    model = network().double()
    model.register_forward_pre_hook(lambda _, given: (given[0].double(),))
    return model


def train(
    model: nn.Module,
    data: ImageSplits,
    folder: Path,
    *,
    seed: int = 3,
    recorded: int = 0,
    on_step: Callable[[int, int], None] = lambda *_: None,
    records: list[dict] | None = None,
    **changes: object,
) -> list[dict]:
    """The records of the first process (`records`, where it is given); those of others are none."""
    records = [] if records is None else records
    how = replace(TRAINING, **changes)
    train_images(model, data, folder, how, seed=seed, recorded=recorded, on_step=on_step, on_epoch=records.append)
    return records


@contextlib.contextmanager
def rates_kept() -> Iterator[list[float]]:
    """The learning rate of every step."""
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    yield rates
    hook.remove()


@contextlib.contextmanager
def norms_kept() -> Iterator[list[float]]:
    """The norm of all gradients as every step takes them: after clipping."""
    norms: list[float] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    hook = register_optimizer_step_pre_hook(keep)
    yield norms
    hook.remove()


def measure(model: nn.Module, data: ImageSplits) -> dict[str, float]:
    """On the test set, all at once."""
    batch = collate(data.test.__getitems__(range(len(data.test))))
    with torch.no_grad():
        logits, labels = model.eval()(batch["pixel_values"]), batch["labels"]
    top1 = 100 * float((logits.argmax(-1) == labels).double().mean())
    return {"top1": top1, "loss": float(nn.functional.cross_entropy(logits, labels))}
