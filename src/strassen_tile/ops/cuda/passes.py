"""What runs on a CUDA device: Triton's kernels where triton is there and takes the tile, plain PyTorch otherwise.

Requires: tensors on one CUDA device. triton is imported when the first of them comes. Not yet measured on a GPU.

    linear        encode → cuBLAS batched product → decode with bias and activation
    norm_linear   norm and encode in one kernel → product → decode
    mlp           (norm and) encode, for gate and up at once → products → decode, activate and encode again in one kernel →
                  product → decode
    fp8_linear    encode and round to fp8 → products channel by channel → decode with bias

Factors one a tile (4-D) are taken by `linear` and by the decoding of `norm_linear`; `mlp`, `fp8_linear` and gradients of such
factors are composed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from strassen_tile.ops import eager, schemas
from strassen_tile.ops.cuda import fp8
from strassen_tile.ops.fused import Norm, Weights, composed_mlp, composed_norm_linear
from strassen_tile.ops.linear import composed, composed_forward
from strassen_tile.tiling import tile_count


@lru_cache(maxsize=1)
def launcher() -> ModuleType | None:
    """The module of kernels; None without triton."""
    try:
        from strassen_tile.ops.cuda import launch
    except ImportError:
        return None
    return launch


def encode(x: Tensor, encoder: Tensor) -> Tensor:
    """As `eager.encode`."""
    launch = launcher()
    if launch is None or not launch.supports(x, encoder.shape):
        return eager.encode(x, encoder)
    return launch.encode(x, encoder)  # type: ignore[no-any-return]


def decode(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """As `eager.decode`."""
    launch = launcher()
    if launch is None or not launch.supports(encoded, decoder.shape):
        return eager.decode(encoded, decoder, batch, rows, columns)
    return launch.decode(encoded, decoder, batch, rows, columns)  # type: ignore[no-any-return]


def correlate(x: Tensor, encoded: Tensor, tile: Sequence[int], per_column: bool) -> Tensor:
    """As `eager.correlate`; sums in float32."""
    launch = launcher()
    if launch is None or per_column or not launch.supports(x, (encoded.shape[0], *tile)):
        return eager.correlate(x, encoded, tile, per_column)
    return launch.correlate(x, encoded, tile)  # type: ignore[no-any-return]


def forward(
    x: Tensor,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str,
) -> Tensor:
    """As `linear.composed`, bias and activation applied while decoding."""
    launch = launcher()
    if launch is None or not (launch.supports(x, encoder.shape) and launch.supports(x, decoder.shape)):
        return composed(x, encoded_weight, encoder, decoder, bias, columns, activation)
    products = torch.bmm(launch.encode(x, encoder, aligned=True), encoded_weight)
    return launch.decode(products, decoder, x.shape[0], x.shape[1], columns, bias, activation)  # type: ignore[no-any-return]


def forward_keeping(
    x: Tensor, encoded_weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    """As `composed_forward`."""
    launch = launcher()
    if launch is None or not (launch.supports(x, encoder.shape) and launch.supports(x, decoder.shape)):
        return composed_forward(x, encoded_weight, encoder, decoder, bias, columns)
    products = torch.bmm(launch.encode(x, encoder, aligned=True), encoded_weight)
    return launch.decode(products, decoder, x.shape[0], x.shape[1], columns, bias), products.view(-1)


def norm_linear(
    x: Tensor,
    norm: str,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    encoded_weight: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
    activation: str,
) -> Tensor:
    """As `fused.composed_norm_linear`; the normed x is never written."""
    launch, before = launcher(), Norm(norm, scale, shift, eps)
    if launch is None or not (launch.supports(x, encoder.shape) and launch.supports(x, decoder.shape)):
        return composed_norm_linear(x, *before, encoded_weight, encoder, decoder, bias, columns, activation)
    products = torch.bmm(_normed_and_encoded(launch, x, before, encoder), encoded_weight)
    return launch.decode(products, decoder, x.shape[0], x.shape[1], columns, bias, activation)  # type: ignore[no-any-return]


def mlp(
    x: Tensor,
    norm: str,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    up: Sequence[Tensor | None],
    gate: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    hidden: int,
    columns: int,
    activation: str,
) -> Tensor:
    """As `fused.composed_mlp`; the normed x and, where all layers have one tile, the hidden features are never written."""
    launch, before = launcher(), Norm(norm, scale, shift, eps)
    layers = [Weights(*layer) for layer in (gate, up, down) if layer]  # type: ignore[arg-type] # only the bias can be None
    if launch is None or not _one_grid(launch, x, layers):
        return composed_mlp(x, *before, up, gate, down, hidden, columns, activation)
    *first, last = layers
    ranks = [layer.encoder.shape[0] for layer in first]
    # One kernel reads x once for gate and up.
    encoder = torch.cat([layer.encoder for layer in first]) if gate else first[0].encoder
    encoded = _normed_and_encoded(launch, x, before, encoder).split(ranks)
    waiting = [
        launch.Decoding(torch.bmm(part, layer.encoded_weight), layer.decoder, layer.bias)
        for part, layer in zip(encoded, first, strict=True)
    ]
    batch, rows, _ = x.shape
    others = waiting[1] if gate else None
    between = launch.decode_act_encode(waiting[0], others, last.encoder, batch, rows, hidden, activation, aligned=True)
    products = torch.bmm(between, last.encoded_weight)
    return launch.decode(products, last.decoder, batch, rows, columns, last.bias)  # type: ignore[no-any-return]


def fp8_linear(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    largest: Tensor,
    encoder_scale: Tensor,
    encoder: Tensor,
    decoder: Tensor,
    bias: Tensor | None,
    columns: int,
) -> Tensor:
    """As `fp8.linear`; X̂ is rounded to fp8 as it is encoded."""
    launch, weight = launcher(), fp8.Rounded(values, scale, largest, encoder_scale)
    if (
        launch is None
        or encoder.ndim == 4
        or not (launch.supports(x, encoder.shape) and launch.supports(x, decoder.shape))
    ):
        return fp8.linear(x, *weight, encoder, decoder, bias, columns)
    (r, p, q), (batch, rows, k), s = encoder.shape, x.shape, decoder.shape[2]
    row_scale = fp8.scale_of_rows(x, p)
    space = fp8.empty_input(r, batch * tile_count(rows, p), tile_count(k, q), x)
    encoded = launch.encode(x, encoder, out=space, scales=(encoder_scale, row_scale))
    products = fp8.products(encoded, weight, tile_count(columns, s), x.dtype)
    y = x.new_empty(batch, rows, columns)
    back = fp8.scale_of_result(row_scale, largest)
    return launch.decode(products, decoder, batch, rows, columns, bias, row_scale=back, out=y)  # type: ignore[no-any-return]


def _normed_and_encoded(launch: ModuleType, x: Tensor, norm: Norm, encoder: Tensor) -> Tensor:
    if norm.kind == "none" or encoder.ndim == 4 or not launch.tiles_together(*encoder.shape[1:], encoder.shape[0]):
        return launch.encode(norm(x), encoder, aligned=True)  # type: ignore[no-any-return]
    return launch.norm_encode(  # type: ignore[no-any-return]
        x, norm.scale, norm.shift, norm.eps, encoder, centre=norm.kind == "layer", aligned=True
    )


def _one_grid(launch: ModuleType, x: Tensor, layers: Sequence[Weights]) -> bool:
    """Whether the kernels take these layers, and the last one reads the tiles that the others write."""
    *first, last = layers
    factors = [factor for layer in layers for factor in (layer.encoder, layer.decoder)]
    if not all(factor.ndim == 3 and launch.supports(x, factor.shape) for factor in factors):
        return False
    together = (sum(layer.encoder.shape[0] for layer in first), *first[0].encoder.shape[1:])
    return (
        launch.supports(x, together)
        and all(layer.encoder.shape[1:] == together[1:] for layer in first)
        and all(layer.decoder.shape[1:] == last.encoder.shape[1:] for layer in first)
    )


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
    (schemas.norm_linear, norm_linear),
    (schemas.mlp, mlp),
    (schemas.fp8_linear, fp8_linear),
    (schemas.encode, encode),
    (schemas.decode, decode),
    (schemas.correlate, correlate),
    (schemas.linear, forward),
    (schemas.linear_forward, forward_keeping),
):
    schemas.register_kernel(_operator, _kernel, "CUDA")
