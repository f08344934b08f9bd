"""Modules of a model replaced in place, all or none, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from strassen_tile.errors import ConversionError


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under every name it goes by; the model itself is ""."""
    return dict(model.named_modules(remove_duplicate=False))


def replace_modules(model: nn.Module, layers: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put each of `layers` at its name in `model`, and at every other name that the same old module goes by; all or none.

    PyTorch's encoders are kept from their fused path, which reads weights itself, where a layer is no `nn.Linear` any more.

    Args:
        model: changed in place.
        layers: name → what is to stand there.

    Returns:
        A function that puts the old modules back, once, with the dtype, device and mode that their replacements have by then.

    Raises:
        ConversionError: there is no such name, two names of one module are given different layers, or an owner does not take
            another module. The model is then as it was.
    """
    modules, wanted = modules_by_name(model), dict[int, nn.Module]()
    for name, layer in layers.items():
        if not name or name not in modules:
            raise ConversionError(f"{type(model).__name__} has no module {name!r} to replace")
        if wanted.setdefault(id(modules[name]), layer) is not layer:
            raise ConversionError(
                f"{name!r} is another name of a module that is given a different replacement; give one"
            )
    places = [
        (owner, child, before, wanted[id(before)])
        for owner in model.modules()
        if not isinstance(owner, torch.jit.ScriptModule)
        for child, before in owner._modules.items()
        if before is not None and id(before) in wanted
    ]
    for at, (owner, child, _, layer) in enumerate(places):
        try:
            setattr(owner, child, layer)
        except BaseException as error:
            for changed, name, before, _ in places[: at + 1]:
                changed._modules[name] = before
            if not isinstance(error, Exception):
                raise
            raise ConversionError(
                f"{type(owner).__name__} does not take another layer as {child!r} ({type(error).__name__}: {error}); leave it "
                "out with filter_fn. Nothing was converted"
            ) from error
    fused = [(module, name, getattr(module, name)) for module, name in _unfusable(model) if getattr(module, name)]
    for module, name, value in fused:
        setattr(module, name, type(value)(0))  # False, or 0

    def undo() -> None:
        while places:
            owner, child, before, layer = places.pop()
            _follow(before, layer)
            owner._modules[child] = before
        still = {id(module) for module, _ in _unfusable(model)}  # by another conversion
        for module, name, value in fused:
            if id(module) not in still:
                setattr(module, name, value)
        fused.clear()

    return undo


def _follow(before: nn.Module, layer: nn.Module) -> None:
    """Give `before` the mode and device of `layer`, which stood in its place, and its dtype if it has parameters."""
    now = next((p for p in layer.parameters() if p.is_floating_point()), None)
    was = next((p for p in before.parameters() if p.is_floating_point()), None)
    if was is not None and not was.is_meta:
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), was.device)
        dtype = was.dtype if now is None else now.dtype
        if (device, dtype) != (was.device, was.dtype):
            before.to(device, dtype)
    before.train(layer.training)


def _unfusable(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """PyTorch's encoders and encoder layers with a layer that is no `nn.Linear`: the attribute that says whether to fuse."""
    for module in model.modules():
        layers = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        parts = [part for e in layers if isinstance(e, nn.TransformerEncoderLayer) for part in (e.linear1, e.linear2)]
        if any(type(part) is not nn.Linear for part in parts):
            encoder = isinstance(module, nn.TransformerEncoder)
            yield module, "use_nested_tensor" if encoder else "activation_relu_or_gelu"
