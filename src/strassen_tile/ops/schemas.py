"""The operator's primitives as `torch.library` operators: schemas, shapes for tracing, FLOP formulas.

`encode`, `decode` and `correlate` are linear in each tensor argument and the gradient of each is made of the others
(`ops/gradients.py`); between them `torch.bmm` does the r products. `linear`, `linear_forward` and `linear_backward` are
whole passes, for a device that can keep X̂ and Ŷ out of memory; `norm_linear` and `mlp` are several steps in a row, for one
that can keep what lies between them out of memory. A device brings its own kernels by registering them under its dispatch
key; `ops/eager.py`, `ops/linear.py` and `ops/fused.py` serve all others.

The operators are raw `Library` ones: `custom_op` breaks `torch.func.grad`, and `triton_op` needs a driver. Gradients and
vmap rules sit on top, in autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from strassen_tile.tiling import tile_count

NAMESPACE = "strassen_tile"
_library = torch.library.Library(NAMESPACE, "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("encode(Tensor x, Tensor encoder) -> Tensor", tags=_tags)
_library.define(
    "decode(Tensor encoded, Tensor decoder, SymInt batch, SymInt rows, SymInt columns) -> Tensor", tags=_tags
)
_library.define("correlate(Tensor x, Tensor encoded, SymInt[] tile, bool per_column) -> Tensor", tags=_tags)
_arguments = "Tensor x, Tensor encoded_weight, Tensor encoder, Tensor decoder, Tensor? bias, SymInt columns"
_library.define(f"linear({_arguments}, str activation) -> Tensor", tags=_tags)
_library.define(f"linear_forward({_arguments}) -> (Tensor y, Tensor kept)", tags=_tags)
_library.define(
    "linear_backward(Tensor grad, Tensor x, Tensor encoded_weight, Tensor encoder, Tensor decoder, Tensor? kept, "
    "bool[] wants) -> (Tensor x, Tensor encoded_weight, Tensor encoder, Tensor decoder, Tensor bias)",
    tags=_tags,
)
_norm = "Tensor x, str norm, Tensor? scale, Tensor? shift, float eps"
_library.define(f"norm_linear({_norm}, {_arguments.removeprefix('Tensor x, ')}, str activation) -> Tensor", tags=_tags)
_library.define(
    f"mlp({_norm}, Tensor?[] up, Tensor?[] gate, Tensor?[] down, SymInt hidden, SymInt columns, str activation) -> Tensor",
    tags=_tags,
)
_library.define(
    "fp8_linear(Tensor x, Tensor values, Tensor scale, Tensor largest, Tensor encoder_scale, Tensor encoder, Tensor decoder, "
    "Tensor? bias, SymInt columns) -> Tensor",
    tags=_tags,
)

encode = torch.ops.strassen_tile.encode.default
decode = torch.ops.strassen_tile.decode.default
correlate = torch.ops.strassen_tile.correlate.default
linear = torch.ops.strassen_tile.linear.default
linear_forward = torch.ops.strassen_tile.linear_forward.default
linear_backward = torch.ops.strassen_tile.linear_backward.default
norm_linear = torch.ops.strassen_tile.norm_linear.default
mlp = torch.ops.strassen_tile.mlp.default
fp8_linear = torch.ops.strassen_tile.fp8_linear.default


def register_kernel(operator: Any, kernel: Callable[..., object], dispatch_key: str) -> None:
    """Make `kernel` what `operator` runs under `dispatch_key`, such as "CPU", "CUDA" or "Autograd"."""
    _library.impl(operator, kernel, dispatch_key)


@torch.library.register_fake(f"{NAMESPACE}::encode")  # type: ignore[untyped-decorator]
def _encode_shape(x: Tensor, encoder: Tensor) -> Tensor:
    r, p, q = encoder.shape[-3:]
    return x.new_empty(r, x.shape[0] * tile_count(x.shape[1], p), tile_count(x.shape[2], q))


@torch.library.register_fake(f"{NAMESPACE}::decode")  # type: ignore[untyped-decorator]
def _decode_shape(encoded: Tensor, decoder: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    return encoded.new_empty(batch, rows, columns)


@torch.library.register_fake(f"{NAMESPACE}::correlate")  # type: ignore[untyped-decorator]
def _correlate_shape(x: Tensor, encoded: Tensor, tile: Sequence[int], per_column: bool) -> Tensor:
    lead = (encoded.shape[2],) if per_column else ()
    return x.new_empty(*lead, encoded.shape[0], *tile)


@torch.library.register_fake(f"{NAMESPACE}::linear")  # type: ignore[untyped-decorator]
def _linear_shape(
    x: Tensor, w: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int, activation: str
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], columns)


@torch.library.register_fake(f"{NAMESPACE}::linear_forward")  # type: ignore[untyped-decorator]
def _forward_shapes(
    x: Tensor, w: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None, columns: int
) -> tuple[Tensor, Tensor]:
    kept = w.shape[0] * x.shape[0] * tile_count(x.shape[1], encoder.shape[-2]) * w.shape[2]
    return x.new_empty(x.shape[0], x.shape[1], columns), x.new_empty(kept)


@torch.library.register_fake(f"{NAMESPACE}::linear_backward")  # type: ignore[untyped-decorator]
def _backward_shapes(
    grad: Tensor, x: Tensor, w: Tensor, encoder: Tensor, decoder: Tensor, kept: Tensor | None, wants: Sequence[bool]
) -> tuple[Tensor, ...]:
    shapes = (x.shape, w.shape, encoder.shape, decoder.shape, grad.shape[2:])
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, wants, strict=True))


@torch.library.register_fake(f"{NAMESPACE}::norm_linear")  # type: ignore[untyped-decorator]
@torch.library.register_fake(f"{NAMESPACE}::mlp")  # type: ignore[untyped-decorator]
def _chain_shape(x: Tensor, *arguments: Any) -> Tensor:
    columns = arguments[-2]
    return x.new_empty(x.shape[0], x.shape[1], columns)


@torch.library.register_fake(f"{NAMESPACE}::fp8_linear")  # type: ignore[untyped-decorator]
def _fp8_shape(x: Tensor, *arguments: Any) -> Tensor:
    columns = arguments[-1]
    return x.new_empty(x.shape[0], x.shape[1], columns)


@register_flop_formula(torch.ops.strassen_tile.encode)  # type: ignore[untyped-decorator, unused-ignore]
def _encode_flops(x: Sequence[int], encoder: Sequence[int], *_: Any, **__: Any) -> int:
    r, p, q = encoder[-3:]
    return 2 * r * x[0] * tile_count(x[1], p) * p * tile_count(x[2], q) * q


@register_flop_formula(torch.ops.strassen_tile.decode)  # type: ignore[untyped-decorator, unused-ignore]
def _decode_flops(encoded: Sequence[int], decoder: Sequence[int], *_: Any, **__: Any) -> int:
    r, p, s = decoder[-3:]
    return 2 * r * encoded[1] * p * encoded[2] * s


@register_flop_formula(torch.ops.strassen_tile.correlate)  # type: ignore[untyped-decorator, unused-ignore]
def _correlate_flops(x: Sequence[int], encoded: Sequence[int], tile: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * encoded[0] * encoded[1] * encoded[2] * tile[0] * tile[1]


@register_flop_formula((torch.ops.strassen_tile.linear, torch.ops.strassen_tile.linear_forward))  # type: ignore[untyped-decorator, unused-ignore]
def _linear_flops(
    x: Sequence[int], weight: Sequence[int], encoder: Sequence[int], decoder: Sequence[int], *_: Any, **__: Any
) -> int:
    return sum(_pass_flops(x, weight, encoder, decoder))


@register_flop_formula(torch.ops.strassen_tile.linear_backward)  # type: ignore[untyped-decorator, unused-ignore]
def _backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    encoder: Sequence[int],
    decoder: Sequence[int],
    kept: Sequence[int] | None,
    wants: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    encode, products, decode = _pass_flops(x, weight, encoder, decoder)  # their adjoints cost as much
    wants_x, wants_weight, wants_encoder, wants_decoder, _bias = wants
    through = wants_x or wants_encoder
    anew = wants_decoder and kept is None
    return (
        encode * (wants_x + wants_encoder + (wants_weight or anew))
        + products * (through + wants_weight + anew)
        + decode * ((through or wants_weight) + wants_decoder)
    )


@register_flop_formula(torch.ops.strassen_tile.norm_linear)  # type: ignore[untyped-decorator, unused-ignore]
def _norm_linear_flops(x: Sequence[int], *arguments: Any, **__: Any) -> int:
    return sum(_pass_flops(x, *arguments[4:7]))


@register_flop_formula(torch.ops.strassen_tile.fp8_linear)  # type: ignore[untyped-decorator, unused-ignore]
def _fp8_flops(x: Sequence[int], *arguments: Any, **__: Any) -> int:
    values, _scale, _largest, _encoder_scale, e, d, _bias, columns = arguments
    sizes = values[0], tile_count(x[2], e[2]), tile_count(columns, d[2])  # what is padded is not counted
    return sum(_pass_flops(x, sizes, e, d))


@register_flop_formula(torch.ops.strassen_tile.mlp)  # type: ignore[untyped-decorator, unused-ignore]
def _mlp_flops(x: Sequence[int], *arguments: Any, **__: Any) -> int:
    up, gate, down, hidden = arguments[4:8]
    layers = [(x, up), (x, gate), ((x[0], x[1], hidden), down)]
    return sum(sum(_pass_flops(fed, *layer[:3])) for fed, layer in layers if layer)


def _pass_flops(
    x: Sequence[int], weight: Sequence[int], encoder: Sequence[int], decoder: Sequence[int]
) -> tuple[int, int, int]:
    """Those of encode, products and decode."""
    r, j, l = weight  # noqa: E741 - the tile index L
    rows = x[0] * tile_count(x[1], encoder[-2])
    return _encode_flops(x, encoder), 2 * r * rows * j * l, _decode_flops((r, rows, l), decoder)
