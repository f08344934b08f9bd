"""Programs that run where this package is not: `torch.export` with the operator in terms of PyTorch's own ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from strassen_tile.errors import ConfigError, ConversionError
from strassen_tile.nn import STLLinearFP8
from strassen_tile.ops.standard import decompositions

Runtime = Literal["pytorch", "onnxruntime"]


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    runtime: Runtime = "pytorch",
) -> torch.export.ExportedProgram:
    """`model` as a program for inference, of operators that every PyTorch has; `torch.onnx.export` takes it as well.

        shapes = ({0: batch, 1: length}, {0: batch, 1: length})
        torch.export.save(st.export(model, (ids, mask), dynamic_shapes=shapes), "model.pt2")  # loads without strassen_tile
        program = st.export(model, (ids, mask), dynamic_shapes=shapes, runtime="onnxruntime")
        torch.onnx.export(program, dynamo=True).save("model.onnx")

    The checks of masks are part of the program (of ONNX they are not: there, padding on the left is not noticed).

    Args:
        model: in eval mode.
        args, kwargs, dynamic_shapes: of `torch.export.export`.
        runtime: where it is to be fast; every program runs in both. For "onnxruntime" tiles are encoded and decoded by
            convolutions, for "pytorch" by permutations and products.

    Raises:
        ConfigError: `runtime` is neither.
        ConversionError: the model is in training mode, or holds layers in fp8.
    """
    if runtime not in get_args(Runtime):
        raise ConfigError(f"runtime must be one of {', '.join(get_args(Runtime))}; got {runtime!r}")
    if model.training:
        raise ConversionError(f"{type(model).__name__} is in training mode; call model.eval() first")
    if name := next((name for name, layer in model.named_modules() if isinstance(layer, STLLinearFP8)), None):
        raise ConversionError(f"{name} is in fp8, which has no form in standard operators; undo quantize_fp8")
    # Else a size that is more than 1 in the example is taken to be more than 1 for ever: a text of one tile is refused.
    with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)
        made: torch.export.ExportedProgram = program.run_decompositions(
            decompositions(convolutions=runtime == "onnxruntime")
        )
    # Tensors without numbers that were loaded lie in storages that torch.export.save does not measure rightly.
    for key, tensor in made.state_dict.items():
        if not tensor.numel():
            made.state_dict[key] = torch.empty_like(tensor)
    return made
