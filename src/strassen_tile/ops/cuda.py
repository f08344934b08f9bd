"""What runs on a CUDA device: Triton's kernels where triton is there and takes the tile, plain PyTorch otherwise.

Requires: tensors on one CUDA device. triton is imported when the first of them comes. Not yet measured on a GPU.

    linear    encode → cuBLAS batched product → decode with the bias
    mlp       encode → product → decode, activate and encode again in one kernel → product → decode
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from strassen_tile.ops import composed, generic, library
from strassen_tile.ops.mlp import two_passes


@lru_cache(maxsize=1)
def launcher() -> ModuleType | None:
    """The module of kernels; None without triton."""
    try:
        from strassen_tile.ops.triton import launch
    except ImportError:
        return None
    return launch


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """As `generic.encode`."""
    launch = launcher()
    if launch is None or not launch.supports(x, encoder.shape):
        return generic.encode(x, encoder)
    return launch.encode(x, encoder)  # type: ignore[no-any-return]


def decode(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """As `generic.decode`."""
    launch = launcher()
    if launch is None or not launch.supports(encoded, decoder.shape):
        return generic.decode(encoded, decoder, batch, rows, columns)
    return launch.decode(encoded, decoder, batch, rows, columns)  # type: ignore[no-any-return]


def correlate(x: Tensor, encoded: Tensor, tile: Sequence[int], per_column: bool) -> Tensor:
    """As `generic.correlate`; sums in float32."""
    launch = launcher()
    if launch is None or per_column or not launch.supports(x, (encoded.shape[0], *tile)):
        return generic.correlate(x, encoded, tile, per_column)
    return launch.correlate(x, encoded, tile)  # type: ignore[no-any-return]


def linear(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str,
) -> Tensor:
    """As `composed.linear`, bias and activation applied while decoding."""
    launch = launcher()
    if launch is None or not (launch.supports(x, encoder.shape) and launch.supports(x, decoder.shape)):
        return composed.linear(x, encoded_weight, encoder, decoder, bias, columns, activation)
    products = torch.bmm(launch.encode(x, encoder, aligned=True), encoded_weight)
    return launch.decode(products, decoder, x.shape[0], x.shape[1], columns, bias, activation)  # type: ignore[no-any-return]


def linear_forward(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    """As `composed.linear_forward`."""
    launch = launcher()
    if launch is None or not (launch.supports(x, encoder.shape) and launch.supports(x, decoder.shape)):
        return composed.linear_forward(x, encoded_weight, encoder, decoder, bias, columns)
    products = torch.bmm(launch.encode(x, encoder, aligned=True), encoded_weight)
    return launch.decode(products, decoder, x.shape[0], x.shape[1], columns, bias), products.view(-1)


def mlp(
    x: Tensor,
    up: Tensor,
    up_encoder: Tensor,
    up_decoder: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_encoder: Tensor,
    down_decoder: Tensor,
    down_bias: Tensor | None,
    hidden: int,
    columns: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """As `mlp.two_passes`; where the second layer's tiles are the first one's, what lies between stays in registers."""
    launch, factors = launcher(), (up_encoder, up_decoder, down_encoder, down_decoder)
    fits = launch is not None and all(launch.supports(x, factor.shape) for factor in factors)
    if not fits or down_encoder.shape[1:] != up_decoder.shape[1:] or (gated and hidden % up_decoder.shape[2]):
        return two_passes(
            x, up, up_encoder, up_decoder, up_bias, down, down_encoder, down_decoder, down_bias,
            hidden, columns, activation, gated,
        )  # fmt: skip
    assert launch is not None
    batch, rows, _ = x.shape
    products = torch.bmm(launch.encode(x, up_encoder, aligned=True), up)
    between = launch.recode(
        products, up_decoder, down_encoder, batch, rows, hidden, up_bias, activation, gated=gated, aligned=True
    )
    return launch.decode(torch.bmm(between, down), down_decoder, batch, rows, columns, down_bias)  # type: ignore[no-any-return]


def refusal(x: Tensor, encoder: Tensor, decoder: Tensor) -> str | None:
    """Why Triton's kernels cannot run these arguments; None if they can."""
    if x.device.type != "cuda":
        return f"x is on {x.device}; move it to a CUDA device"
    launch = launcher()
    if launch is None:
        return "triton is not installed: pip install triton"
    for name, factor in (("encoder", encoder), ("decoder", decoder)):
        if not launch.supports(x, factor.shape):
            return f"its kernels do not take {x.dtype} with an {name} of shape {tuple(factor.shape)}"
    return None


for _operator, _kernel in (
    (library.mlp, mlp),
    (library.encode, encode),
    (library.decode, decode),
    (library.correlate, correlate),
    (library.linear, linear),
    (library.linear_forward, linear_forward),
):
    library.register_kernel(_operator, _kernel, "CUDA")
