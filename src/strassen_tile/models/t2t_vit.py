"""T2T-ViT: tokens-to-token module, class token or mean, sinusoid positions, transformer blocks, head.

Source: Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", 2021 (arXiv
2101.11986). Parameter names and shapes are those of the published checkpoints. Requires torch only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.errors import ShapeError, shape_text
from strassen_tile.models.layers import Block, sinusoid_table
from strassen_tile.models.sizes import T2TConfig, named_config
from strassen_tile.models.token_modules import TokensToToken


class T2TViT(nn.Module):
    """A T2T-ViT of any size: pixels (B, in_channels, image_size, image_size) -> logits (B, num_classes).

    Linear weights and the class token start as a normal of deviation 0.02 cut off at ±2, biases at zero. `pos_embed`
    and the performer's `w` are parameters without gradient, so that checkpoints hold them.

    Args:
        config: the sizes, see `T2TConfig`; also the attribute `config`.
    """

    def __init__(self, config: T2TConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        if config.pool == "cls":
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.pos_embed = nn.Parameter(sinusoid_table(config.tokens, dim), requires_grad=False)
        self.tokens_to_token = TokensToToken(config)
        scale = (dim // config.heads) ** -0.5 if config.qk_scale is None else config.qk_scale
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.heads,
                int(dim * config.mlp_ratio),
                scale=scale,
                qkv_bias=config.qkv_bias,
                drop_path=config.drop_path * index / max(1, config.depth - 1),
            )
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.num_classes)
        self.apply(_initialise)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, num_classes) of pixels (B, in_channels, image_size, image_size).

        Raises:
            ShapeError: `pixels` has another shape.
        """
        config = self.config
        expected = (config.in_channels, config.image_size, config.image_size)
        if pixels.dim() != 4 or pixels.shape[1:] != expected:
            raise ShapeError(
                f"T2TViT(pixels): expected (B, {', '.join(map(str, expected))}), got {shape_text(pixels.shape)}."
            )
        x: Tensor = self.tokens_to_token(pixels)
        if config.pool == "cls":
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.pos_embed  # under autocast this makes the residual stream float32, as it should be
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x[:, 0] if config.pool == "cls" else x.mean(dim=1))
        return logits


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def t2t_vit(
    name: str = "t2t_vit_7",
    *,
    num_classes: int = 1000,
    image_size: int = 224,
    in_channels: int = 3,
    drop_path: float = 0.0,
    qk_scale: float | None = None,
    **overrides: Any,
) -> T2TViT:
    """A named T2T-ViT with fresh weights; `load_checkpoint` fills in published ones.

    Args:
        name: "t2t_vit_7", "_10", "_12", "_14", "_19", "_24": published, with performer token modules;
            "t2t_vit_t_14", "_t_19", "_t_24": published, with transformer token modules;
            "t2t_vit_mini", "_micro", "_nano", "_wide": for images of 8 to 32 pixels, with soft splits chosen from `image_size`
            (a 4×4 grid of tokens for 8 to 16 pixels, 7×7 for 28, 8×8 for 32) and the mean over tokens in place of the
            class token, so that the token count stays a multiple of 4 where the grid allows it.
        num_classes: logits.
        image_size: pixels per side, square.
        in_channels: 1 for gray, 3 for colour.
        drop_path: stochastic depth of the last block, from 0 in the first linearly over depth.
        qk_scale: factor of q·kᵀ in the blocks. None is head_dim**-0.5, the choice for training from scratch. The
            published checkpoints were trained with embed_dim**-0.5: their weights load either way, but only
            `qk_scale=embed_dim**-0.5` (e.g. 384**-0.5 for t2t_vit_14) gives the published accuracy.
        **overrides: any other field of `T2TConfig`.

    Returns:
        A model: pixels (B, in_channels, image_size, image_size) -> logits (B, num_classes).

    Raises:
        ConfigError: unknown name or field, or a value that makes no sense.
        ShapeError: the image is too small for the soft splits.
    """
    config = named_config(
        name,
        image_size=image_size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        qk_scale=qk_scale,
        **overrides,
    )
    return T2TViT(config)
