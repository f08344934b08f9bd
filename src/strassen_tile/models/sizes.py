"""The sizes of T2T-ViT: one frozen dataclass, a table of named sizes, and the splits for small images.

Source: Yuan et al., "Tokens-to-Token ViT", 2021 (arXiv 2101.11986), table 1. `t2t_vit_mini`, `t2t_vit_micro`,
`t2t_vit_nano` and `t2t_vit_wide` are not published: the same modules for images of 8 to 32 pixels; `t2t_vit_wide` has
ViT-B's width and two blocks, for questions of speed.

Size of one image at 224×224, 1000 classes, beside the published figures (the authors' README). Parameters: all of
them, the fixed position table and random features included. MACs: every matrix product, those inside attention and the
performer's features and sums included, nothing elementwise; "linear" is the part in `nn.Linear` layers.

    name          params (M)         MACs (G)         linear (G)
    t2t_vit_7      4.31 (4.3)        1.147 (1.1)       0.976
    t2t_vit_10     5.89 (5.9)        1.516 (1.5)       1.285
    t2t_vit_12     6.94 (6.9)        1.763 (1.8)       1.492
    t2t_vit_14    21.55 (21.5)       4.783 (4.8)       4.334
    t2t_vit_19    39.18 (39.2)       8.480 (8.5)       7.787
    t2t_vit_24    64.11 (64.1)      13.662 (13.8)     12.676
    t2t_vit_t_14  21.54 (21.5)       6.089 (6.1)       4.334
    t2t_vit_t_19  39.17 (39.2)       9.785 (9.8)       7.787
    t2t_vit_t_24  64.10 (64.1)      14.967 (15.0)     12.676

Only the 13.8 of t2t_vit_24 is not reproduced. Under this count the two kinds of token module differ by 1.305 G at every
size, and no two numbers that far apart round to 15.0 and 13.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from strassen_tile.errors import ConfigError, ShapeError, shape_text


class SoftSplit(NamedTuple):
    """One soft split: overlapping square patches, unfolded into tokens of channels · kernel² features."""

    kernel: int
    stride: int
    padding: int

    def out_size(self, size: int) -> int:
        """Patches along a side of `size` pixels; 0 or less when not one fits."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


PUBLISHED_SPLITS = (SoftSplit(7, 4, 2), SoftSplit(3, 2, 1), SoftSplit(3, 2, 1))
SMALLEST_IMAGE = 8  # of the sizes for small images


def small_splits(image_size: int) -> tuple[SoftSplit, SoftSplit]:
    """Two 3×3 soft splits for a small image: a 4×4 token grid for 8 to 16 pixels, 7×7 for 28, 8×8 for 32.

    With padding 1 a side of n gives ⌈n/stride⌉ tokens, so from 13 pixels on two strides of 2 give ⌈n/4⌉. Below that
    they would leave 3×3 tokens or fewer; the first split then keeps every pixel and the second picks 4 per side.

    Raises:
        ShapeError: fewer than 8 pixels.
    """
    if image_size < SMALLEST_IMAGE:
        raise ShapeError(
            f"small_splits(image_size={image_size}): expected images of at least "
            f"{shape_text((SMALLEST_IMAGE, SMALLEST_IMAGE))} pixels, got {shape_text((image_size, image_size))}; "
            "enlarge the images or pass splits=."
        )
    every_pixel = SoftSplit(3, 1, 1)
    if image_size == 8:
        return every_pixel, SoftSplit(3, 2, 1)
    if image_size == 9:  # ⌈9/2⌉ is 5 and ⌈9/3⌉ is 3; without padding exactly 4 patches cover the side
        return every_pixel, SoftSplit(3, 2, 0)
    if image_size <= 12:
        return every_pixel, SoftSplit(3, 3, 1)
    return SoftSplit(3, 2, 1), SoftSplit(3, 2, 1)


@dataclass(frozen=True)
class T2TConfig:
    """Everything that defines a T2T-ViT.

    Args:
        embed_dim: features of a token in the backbone; a multiple of `heads`.
        depth: number of backbone blocks.
        heads: attention heads of a block.
        mlp_ratio: hidden features of a block's MLP over `embed_dim`.
        token_type: attention between soft splits, "performer" (linear cost) or "transformer" (quadratic cost).
        token_dim: features of a token between soft splits.
        token_dropout: dropout inside the performer token modules, 0.1 in the paper's models.
        splits: the soft splits as (kernel, stride, padding); one attention stands between each two.
        pool: "cls" reads the logits off a class token (tokens + 1 in the backbone), "mean" averages the tokens.
        image_size: pixels per side, square.
        in_channels: 1 for gray, 3 for colour.
        num_classes: logits.
        qkv_bias: whether the blocks' qkv layers have a bias.
        qk_scale: factor of q·kᵀ in the blocks; None is (embed_dim / heads)**-0.5. See `t2t_vit`.
        drop_path: stochastic depth of the last block; the blocks before have linearly less, the first none.

    Raises:
        ConfigError: a value that makes no sense.
        ShapeError: the image is too small for the splits.
    """

    embed_dim: int
    depth: int
    heads: int
    mlp_ratio: float
    token_type: Literal["performer", "transformer"] = "performer"
    token_dim: int = 64
    token_dropout: float = 0.1
    splits: tuple[SoftSplit, ...] = PUBLISHED_SPLITS
    pool: Literal["cls", "mean"] = "cls"
    image_size: int = 224
    in_channels: int = 3
    num_classes: int = 1000
    qkv_bias: bool = False
    qk_scale: float | None = None
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(_soft_split(split) for split in self.splits))
        for name in ("embed_dim", "depth", "heads", "token_dim", "image_size", "in_channels", "num_classes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"T2TConfig({name}={value!r}): expected a positive integer.")
        if self.embed_dim % self.heads:
            raise ConfigError(
                f"T2TConfig(embed_dim={self.embed_dim}, heads={self.heads}): embed_dim must be a multiple of heads."
            )
        if not _is_number(self.mlp_ratio) or self.mlp_ratio <= 0:
            raise ConfigError(f"T2TConfig(mlp_ratio={self.mlp_ratio!r}): expected a positive number.")
        if self.qk_scale is not None and not _is_number(self.qk_scale):
            raise ConfigError(f"T2TConfig(qk_scale={self.qk_scale!r}): expected a number or None.")
        for name, choices in (("token_type", ("performer", "transformer")), ("pool", ("cls", "mean"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"T2TConfig({name}={getattr(self, name)!r}): expected one of {choices}.")
        for name in ("drop_path", "token_dropout"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"T2TConfig({name}={getattr(self, name)!r}): expected 0 <= {name} < 1.")
        if not self.splits:
            raise ConfigError("T2TConfig(splits=()): expected at least one soft split.")
        if self.grid_sizes[-1] < 1:
            smallest = _least_image(self.splits)
            raise ShapeError(
                f"T2TConfig(image_size={self.image_size}): expected images of at least {shape_text((smallest, smallest))} "
                f"pixels for the splits {[tuple(split) for split in self.splits]}, got "
                f"{shape_text((self.image_size, self.image_size))}; t2t_vit_mini and t2t_vit_micro take small images."
            )

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Tokens per side after each soft split, e.g. (56, 28, 14) for the published models at 224 pixels."""
        sizes = [self.image_size]
        for split in self.splits:
            sizes.append(max(0, split.out_size(sizes[-1])))
        return tuple(sizes[1:])

    @property
    def tokens(self) -> int:
        """Tokens in the backbone: the last grid, and the class token where there is one."""
        return self.grid_sizes[-1] ** 2 + (self.pool == "cls")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _soft_split(split: object) -> SoftSplit:
    if not isinstance(split, (tuple, list)) or len(split) != 3 or not all(isinstance(value, int) for value in split):
        raise ConfigError(f"T2TConfig(splits=…): expected (kernel, stride, padding) integers, got {split!r}.")
    kernel, stride, padding = split
    if kernel < 1 or stride < 1 or padding < 0:
        raise ConfigError(f"T2TConfig(splits=…): expected kernel, stride >= 1 and padding >= 0, got {split!r}.")
    return SoftSplit(kernel, stride, padding)


def _least_image(splits: tuple[SoftSplit, ...]) -> int:
    """Least pixels per side that leave one token: the inverse of `SoftSplit.out_size`, from the last split back."""
    size = 1
    for split in reversed(splits):
        size = max(1, (size - 1) * split.stride + split.kernel - 2 * split.padding)
    return size


def _size(embed_dim: int, depth: int, heads: int, mlp_ratio: float, **more: object) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depth": depth, "heads": heads, "mlp_ratio": mlp_ratio, **more}


SIZES: Mapping[str, Mapping[str, Any]] = {
    "t2t_vit_7": _size(256, 7, 4, 2.0),
    "t2t_vit_10": _size(256, 10, 4, 2.0),
    "t2t_vit_12": _size(256, 12, 4, 2.0),
    "t2t_vit_14": _size(384, 14, 6, 3.0),
    "t2t_vit_19": _size(448, 19, 7, 3.0),
    "t2t_vit_24": _size(512, 24, 8, 3.0),
    "t2t_vit_t_14": _size(384, 14, 6, 3.0, token_type="transformer"),
    "t2t_vit_t_19": _size(448, 19, 7, 3.0, token_type="transformer"),
    "t2t_vit_t_24": _size(512, 24, 8, 3.0, token_type="transformer"),
    "t2t_vit_mini": _size(256, 4, 4, 3.0, pool="mean"),
    "t2t_vit_micro": _size(128, 4, 4, 2.0, pool="mean"),
    "t2t_vit_nano": _size(256, 2, 4, 3.0, pool="mean"),
    "t2t_vit_wide": _size(768, 2, 12, 4.0, pool="mean"),
}
SMALL_IMAGE_SIZES = ("t2t_vit_mini", "t2t_vit_micro", "t2t_vit_nano", "t2t_vit_wide")


def named_config(name: str, *, image_size: int, **options: Any) -> T2TConfig:
    """The `T2TConfig` of a named size, with some fields overridden.

    Raises:
        ConfigError: unknown name or field, or a value that makes no sense.
        ShapeError: the image is too small.
    """
    if name not in SIZES:
        raise ConfigError(f"t2t_vit({name!r}): no such size; the sizes are {', '.join(SIZES)}.")
    known = [field.name for field in fields(T2TConfig)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"t2t_vit({name!r}): unknown option {', '.join(unknown)}; T2TConfig has {', '.join(known)}.")
    if name in SMALL_IMAGE_SIZES and "splits" not in options and isinstance(image_size, int):
        options["splits"] = small_splits(image_size)
    return T2TConfig(**{**SIZES[name], **options, "image_size": image_size})
