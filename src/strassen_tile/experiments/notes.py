"""What rows and pages say of a comparison on images: of the data, of the recipe."""

from __future__ import annotations

from pathlib import Path

from strassen_tile.data import ImageSplits, augmentation_text
from strassen_tile.experiments.recipe import Recipe
from strassen_tile.records import Row

_OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD with momentum", "soap": "SOAP"}
_SCOPES = {
    "blocks": "are converted; the token module and the head are not",
    "all": "and of the token module are converted; the head is not",
}


def facts(splits: ImageSplits) -> Row:
    """What numbers of a comparison are measured by: image counts, sides in pixels, chance in per cent."""
    return {
        "train_images": len(splits.train),
        **({} if splits.validation is None else {"val_images": len(splits.validation)}),
        "test_images": len(splits.test),
        "classes": splits.num_classes,
        "image_size": splits.image_size,
        "stored_size": splits.stored_size,
        "chance": 100 * splits.chance,
    }


def remarks(splits: ImageSplits) -> list[str]:
    """What is said before training as well: what a user may not expect."""
    size, stored = splits.image_size, splits.stored_size
    if size > stored:
        return [f"Images of {stored} pixels are scaled up to {size}."]
    return [f"Images of {stored} pixels are scaled down to {size}."] if size < stored else []


def epochs(recipe: Recipe) -> str:
    """How many there are, in words."""
    return "1 epoch" if recipe.epochs == 1 else f"{recipe.epochs} epochs"


def notes(recipe: Recipe, splits: ImageSplits) -> list[str]:
    """Paragraphs of the page: how the runs were made."""
    schedule = (
        f"Every method trains the same {recipe.model} from the same start with the same recipe, but for what its variant says: "
        f"{_OPTIMIZERS[recipe.optimizer]} at {_rate(recipe)}, weight decay {recipe.weight_decay:g} (none on encoders, "
        f"decoders, biases and norms), {recipe.warmup:.0%} warm-up, cosine decay, label smoothing "
        f"{recipe.label_smoothing:g}, drop path {recipe.drop_path:g}, batches of {recipe.batch_size} on all "
        f"devices together, {recipe.precision}, {epochs(recipe)}, seeds "
        f"{', '.join(map(str, recipe.seeds))}."
    )
    converted = (
        f"The linear layers of the transformer blocks {_SCOPES[recipe.scope]}. STL, where its "
        f"variant says nothing else: tile {'×'.join(map(str, recipe.tile))}, mixing {recipe.mixing}, encoder scope "
        f"{recipe.encoder_scope}, start {recipe.init}"
        f"{'' if recipe.train_encoder else ', encoders fixed'}{'' if recipe.train_decoder else ', decoders fixed'}."
    )
    return [schedule, f"Images: {splits.preparation}.", converted, *_start(recipe)]


def _rate(recipe: Recipe) -> str:
    if not recipe.lr_grid:
        return f"{recipe.lr:g} where its entry says nothing else"
    grid = ", ".join(f"{lr:g}" for lr in recipe.lr_grid)
    return f"the rate of {grid} with which a run of another seed ended at the lowest loss on the validation images"


def _start(recipe: Recipe) -> list[str]:
    """What pages say of a recipe's start, schedule and augmentation that recipes did not always have."""
    found = []
    if recipe.checkpoint is not None:
        found.append(
            f"The dense network starts from {Path(recipe.checkpoint).name}; its head is new where the classes are others."
        )
    if recipe.min_lr or recipe.cooldown:
        found.append(
            f"The cosine ends at {recipe.min_lr:g}, and the last {recipe.cooldown} epochs are trained at that."
        )
    if text := augmentation_text(recipe):
        found.append(f"More augmentation in training: {text.removeprefix(', ')}.")
    if recipe.ema:
        found.append(f"An average of the weights is evaluated, of decay {recipe.ema:g} a step, less at the start.")
    return found
