"""The dense network that every method of a comparison on images starts from, and which of its layers are replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from strassen_tile.data import ImageSplits, augmented
from strassen_tile.data.idx import need
from strassen_tile.errors import DataError
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.models import T2TViT, load_checkpoint, t2t_vit

# What depends on the number of classes or on the size of the images, and may be of others in a checkpoint. The table of
# positions is not trained: that of our size is the one that was meant.
_MAY_DIFFER = ("head.", "pos_embed")


def in_blocks(module: nn.Module, name: str) -> bool:
    """The layers the paper replaces: the linear ones of the transformer blocks."""
    return name.startswith("blocks.")


def all_but_head(module: nn.Module, name: str) -> bool:
    """The linear layers of the token module as well."""
    return name.startswith(("blocks.", "tokens_to_token."))


SCOPES: dict[str, Callable[[nn.Module, str], bool]] = {"blocks": in_blocks, "all": all_but_head}


def check(recipe: Recipe, splits: ImageSplits) -> None:
    """Find out what cannot be done, before anything is written.

    Raises:
        ConfigError: `randaugment` is no configuration.
        DataError: `checkpoint` is no file.
        ImportError: the augmentation needs timm or torchvision, or an optimiser its package, and it is missing.
    """
    if "soap" in {recipe.optimizer, *(one.changes.get("optimizer") for one in recipe.roster())}:
        need("pytorch_optimizer", "optimizer soap", "optimizers")
    augmented(splits.train, recipe, splits.num_classes)
    if recipe.checkpoint is not None and not Path(recipe.checkpoint).is_file():
        raise DataError(f"checkpoint={recipe.checkpoint!r}: no such file; expected the weights of a {recipe.model}")


def network(recipe: Recipe, splits: ImageSplits, *, width: int | None = None) -> T2TViT:
    """The network, with weights from torch's global generator, or with those of `recipe.checkpoint`.

    Args:
        recipe: what is compared, fitted to the data.
        splits: the data.
        width: features of a token; None: the model's own.

    Raises:
        DataError: the checkpoint cannot be read, or is of another network.
    """
    model = t2t_vit(
        recipe.model,
        num_classes=splits.num_classes,
        image_size=splits.image_size,
        in_channels=splits.channels,
        drop_path=recipe.drop_path,
        qk_scale=recipe.qk_scale,
        **({} if width is None else {"embed_dim": width}),
    )
    if recipe.checkpoint is not None:
        load_checkpoint(model, recipe.checkpoint, may_differ=_MAY_DIFFER)
    return model
