"""A network and a recipe without random draws, for runs that must agree however many processes share them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from strassen_tile import STLConfig, convert
from strassen_tile.data import ImageSplits, collate, load_images
from strassen_tile.integrations.images import train_images
from strassen_tile.integrations.training import Training
from strassen_tile.models import t2t_vit

TRAINING = Training(epochs=2, batch_size=16, lr=3e-3, warmup=0.25, precision="float32")


def splits(limit: int) -> ImageSplits:
    return load_images("digits", limit=limit, augment=False)


def network() -> nn.Module:
    torch.manual_seed(5)
    model = t2t_vit("t2t_vit_micro", num_classes=10, image_size=8, in_channels=1)
    convert(
        model, STLConfig(rank=8), example_inputs=torch.randn(2, 1, 8, 8), filter_fn=lambda _, fqn: fqn[:6] == "blocks"
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def train(
    model: nn.Module,
    data: ImageSplits,
    folder: Path,
    *,
    seed: int = 3,
    recorded: int = 0,
    on_step: Callable[[int, int], None] = lambda *_: None,
    **changes: object,
) -> list[dict]:
    """The records of the first process; those of others are none."""
    records: list[dict] = []
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


def measure(model: nn.Module, data: ImageSplits) -> dict[str, float]:
    """On the test set, all at once."""
    batch = collate(data.test.__getitems__(range(len(data.test))))
    with torch.no_grad():
        logits, labels = model.eval()(batch["pixel_values"]), batch["labels"]
    top1 = 100 * float((logits.argmax(-1) == labels).double().mean())
    return {"top1": top1, "loss": float(nn.functional.cross_entropy(logits, labels))}
