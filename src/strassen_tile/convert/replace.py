"""Modules of a model replaced in place, all or none, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from strassen_tile.errors import ConversionError
from strassen_tile.nn import STLLinearFP8

_FUSED = "_strassen_tile_fused"  # on an encoder: whether PyTorch fused it before one of its layers was replaced


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under every name it goes by; the model itself is ""."""
    return dict(model.named_modules(remove_duplicate=False))


def replace_modules(model: nn.Module, layers: Mapping[str, nn.Module]) -> Undo:
    """Put each of `layers` at its name in `model`, and at every other name that the same old module goes by; all or none.

    PyTorch's encoders are kept from their fused path, which reads weights itself, where a layer is no `nn.Linear` any more.

    Args:
        model: changed in place.
        layers: name → what is to stand there.

    Returns:
        What puts the old modules back when called, with the dtype, device and mode that their replacements have by then.

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
    fused_before = {id(module) for module, _ in _unfusable(model)}
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
                "out. Nothing was changed"
            ) from error
    for module, name in _unfusable(model):
        if id(module) not in fused_before:
            value = getattr(module, name)
            vars(module).setdefault(_FUSED, value)
            setattr(module, name, type(value)(0))  # False, or 0
    return Undo(model, places)


@dataclass
class Undo:
    """Puts old modules back where their replacements stand by then, wherever that is in the model.

    Attributes:
        model: that they were replaced in.
        places: owner, its name for the module, the old module and the new one.
    """

    model: nn.Module
    places: list[tuple[nn.Module, str, nn.Module, nn.Module]]

    def __call__(self) -> None:
        """Do so, once.

        Raises:
            ConversionError: something else has taken the place of a replacement. Nothing is changed then.
        """
        owners = {id(owner): owner for owner in (*self.model.modules(), *(place[0] for place in self.places))}
        owners = {key: owner for key, owner in owners.items() if not isinstance(owner, torch.jit.ScriptModule)}
        old = {id(layer): before for _, _, before, layer in self.places}
        held = [(o, c, m) for o in owners.values() for c, m in o._modules.items() if m is not None and id(m) in old]
        inside, found = set(map(id, self.model.modules())), {id(layer) for _, _, layer in held}
        for owner, child, _, layer in self.places:
            now = owner._modules.get(child)
            if id(layer) not in found and id(owner) in inside and now is not None:
                raise ConversionError(
                    f"{child} is a {type(now).__name__} by now, put there after the {type(layer).__name__} that is to be "
                    "taken back: undo that first. Nothing was changed"
                )
        for owner, child, layer in held:
            _follow(old[id(layer)], layer)
            owner._modules[child] = old[id(layer)]
        self.places.clear()
        still = {id(module) for module, _ in _unfusable(self.model)}  # by another conversion
        for module in self.model.modules():
            if _FUSED in vars(module) and id(module) not in still:
                name = "use_nested_tensor" if isinstance(module, nn.TransformerEncoder) else "activation_relu_or_gelu"
                setattr(module, name, vars(module).pop(_FUSED))


def _follow(before: nn.Module, layer: nn.Module) -> None:
    """Give `before` the mode and device of `layer`, which stood in its place, and its dtype if it has parameters."""
    numbers = [layer.encoder] if isinstance(layer, STLLinearFP8) else layer.parameters()  # it has buffers only
    now = next((t for t in numbers if t.is_floating_point()), None)
    was = next((p for p in before.parameters() if p.is_floating_point()), None)
    if was is not None and not was.is_meta:
        device = next((t.device for t in (*layer.parameters(), *layer.buffers())), was.device)
        dtype = was.dtype if now is None else now.dtype
        if (device, dtype) != (was.device, was.dtype):
            before.to(device, dtype)
    shared = set(layer.modules())
    for module in before.modules():
        if module not in shared:
            module.training = layer.training


def _unfusable(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """PyTorch's encoders and encoder layers with a layer that is no `nn.Linear`: the attribute that says whether to fuse."""
    for module in model.modules():
        layers = module.layers if isinstance(module, nn.TransformerEncoder) else [module]
        parts = [
            getattr(e, name, None)
            for e in layers
            if isinstance(e, nn.TransformerEncoderLayer)
            for name in ("linear1", "linear2")
        ]
        if any(type(part) is not nn.Linear for part in parts):
            name = "use_nested_tensor" if isinstance(module, nn.TransformerEncoder) else "activation_relu_or_gelu"
            if hasattr(module, name):
                yield module, name
