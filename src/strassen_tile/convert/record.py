"""What a checkpoint says of a converted model besides its tensors: which layers are STL layers, of which kind, and why others
are not. With it the layers are put into a freshly built dense model, for the tensors to be loaded into.

    {"quant_method": "stl", "format": 1, "version": "0.9.0",
     "kinds": [{"layer": "STLLinear", "tile": [4, 4, 4], "rank": 24, …}],
     "layers": {"encoder.layer.0.attention.self.query": 0, …},
     "skipped": {"classifier": "…"}}

and "part": true where it is of a part, and the tensors beside it those of the whole. A kind is an `STLConfig` and the class
of the layer. Factors are tensors of the checkpoint: a basis that came from a file is
named here, not found by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from strassen_tile._version import __version__
from strassen_tile.convert.replace import replace_modules
from strassen_tile.convert.select import padding_of
from strassen_tile.convert.swap import Conversion
from strassen_tile.errors import CheckpointError, ConfigError, ConversionError
from strassen_tile.nn import STLConfig, STLLinear, STLLinearFP8
from strassen_tile.nn.base import TileLayer
from strassen_tile.nn.config import NAMES

QUANT_METHOD = "stl"
FORMAT = 1
_LAYERS: dict[str, Callable[..., TileLayer]] = {"STLLinear": STLLinear, "STLLinearFP8": STLLinearFP8.blank}


@dataclass(frozen=True)
class Kind:
    """What a layer is, apart from its sizes.

    Attributes:
        layer: the class, "STLLinear" or "STLLinearFP8".
        config: of the layer.
    """

    layer: str
    config: STLConfig

    def build(self, linear: nn.Linear) -> TileLayer:
        """A layer of this kind for the place of `linear`, of its device and dtype, without numbers."""
        sizes, device = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight.device
        with torch.device("meta"):
            made = _LAYERS[self.layer](*sizes, config=self.config, dtype=linear.weight.dtype)
        made = made if device.type == "meta" else made.to_empty(device=device)
        for parameter in made.parameters():
            parameter.requires_grad_(linear.weight.requires_grad)
        return made.train(linear.training)


@dataclass(frozen=True)
class Record:
    """Which layers of a model are STL layers.

    Attributes:
        layers: name → kind.
        skipped: name → why that linear layer is dense.
        part: whether the tensors are those of a model that holds this one: there may be more STL layers among them.
    """

    layers: dict[str, Kind]
    skipped: dict[str, str] = field(default_factory=dict)
    part: bool = False

    @classmethod
    def of(cls, model: nn.Module, skipped: Mapping[str, str] | None = None) -> Record | None:
        """What `model` is now; None without STL layers."""
        layers = {
            name: Kind(type(layer).__name__, _portable(layer.config))
            for name, layer in model.named_modules()
            if isinstance(layer, TileLayer)
        }
        return cls(layers, dict(skipped or {})) if layers else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds."""
        kinds = list(dict.fromkeys(self.layers.values()))
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "version": __version__,
            "kinds": [{"layer": kind.layer, **kind.config.to_dict()} for kind in kinds],
            "layers": {name: kinds.index(kind) for name, kind in self.layers.items()},
            "skipped": dict(self.skipped),
            **({"part": True} if self.part else {}),
        }

    @classmethod
    def from_dict(cls, record: object) -> Record:
        """The record that `to_dict` wrote.

        Raises:
            CheckpointError: it is malformed, or of a newer format.
        """
        if not isinstance(record, Mapping):
            raise CheckpointError(f"quantization_config must be an object; got a {type(record).__name__}")
        if record.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"quant_method is {record.get('quant_method')!r}, not {QUANT_METHOD!r}")
        if not isinstance(number := record.get("format"), int) or number < 1:
            raise CheckpointError(f"quantization_config has no format that is a number from 1: {number!r}")
        if number > FORMAT:
            raise CheckpointError(
                f"written by strassen-tile {record.get('version')} in format {number}; this is {__version__}, which reads up "
                f"to format {FORMAT}: pip install --upgrade strassen-tile"
            )
        kinds, layers, skipped = (record.get(key, {}) for key in ("kinds", "layers", "skipped"))
        if not isinstance(kinds, list) or not isinstance(layers, Mapping) or not isinstance(skipped, Mapping):
            raise CheckpointError("quantization_config: kinds must be a list, layers and skipped objects")
        known = [_kind(number, kind) for number, kind in enumerate(kinds)]
        wrong = {n: at for n, at in layers.items() if type(at) is not int or not 0 <= at < len(known)}
        if wrong or not layers:
            example = next(iter(wrong.items()), None)
            raise CheckpointError(
                f"quantization_config: layers must be names → one of {len(known)} kinds; got {example}"
            )
        return cls(
            {str(name): known[at] for name, at in layers.items()},
            {str(name): str(why) for name, why in skipped.items()},
            record.get("part") is True,
        )

    def put_into(self, model: nn.Module, rename: Callable[[str], str | None] = lambda name: name) -> Conversion:
        """Put layers of the recorded kinds, without numbers yet, into `model`, which is dense.

        Args:
            model: changed in place, all layers or none. A layer that is of the kind already stays.
            rename: a name of the record → that in the model, or None where the model does not have that part.

        Returns:
            A `Conversion`, which cannot be undone: there is no dense weight.

        Raises:
            CheckpointError: the model has no linear layer of such a name. It is then as it was.
        """
        made: dict[str, nn.Module] = {}
        there: dict[str, nn.Module] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for recorded, kind in self.layers.items():
            if (name := rename(recorded)) is None:
                continue
            module = modules.get(name)
            if isinstance(module, TileLayer) and Kind(type(module).__name__, _portable(module.config)) == kind:
                there[name] = module
            elif type(module) is nn.Linear and name:
                made[name] = kind.build(module)
            else:
                what = "no layer" if module is None else f"a {type(module).__name__}"
                raise CheckpointError(
                    f"the checkpoint has an {kind.layer} at {recorded!r}, where {type(model).__name__} has {what}, "
                    "no nn.Linear: it is of another model"
                )
        undo = replace_modules(model, made)
        configs = [kind.config for kind in self.layers.values()]
        padding = padding_of(configs) if any(config.mixes_rows for config in configs) else None
        renamed = ((rename(name), why) for name, why in self.skipped.items())
        skipped = {name: why for name, why in renamed if name is not None and name in modules}
        return Conversion({**made, **there}, skipped, padding=padding, _undo=[undo])


def follow(model: nn.Module, conversion: Conversion) -> None:
    """The last step of loading, once the tensors are there: masks are followed, and frozen factors are frozen again."""
    for layer in conversion.converted.values():
        if isinstance(layer, TileLayer):
            layer.padding = conversion.padding if layer.config.mixes_rows else None
        if isinstance(layer, STLLinear):
            trained = layer.encoded_weight.requires_grad
            layer.encoder.requires_grad_(trained and layer.config.train_encoder)
            layer.decoder.requires_grad_(trained and layer.config.train_decoder)
    if conversion.padding is not None:
        conversion.padding.attach(model)
    conversion._undo[:] = [_refuse_undo]


def conversion_of(model: nn.Module, skipped: Mapping[str, str] | None = None) -> Conversion:
    """What a model holds now, as a `Conversion` that cannot be undone.

    Raises:
        CheckpointError: it has no STL layers.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TileLayer)}
    if not layers:
        raise CheckpointError(f"{type(model).__name__} has no STL layers")
    padding = next((layer.padding for layer in layers.values() if layer.padding is not None), None)
    return Conversion(dict(layers), dict(skipped or {}), padding=padding, _undo=[_refuse_undo])


def tensors_wanted(conversion: Conversion) -> list[str]:
    """The names of the tensors that the layers of a conversion have."""
    return [f"{name}.{key}" for name, layer in conversion.converted.items() for key in layer.state_dict()]


def _refuse_undo() -> None:
    raise ConversionError(
        "the dense weights are not here: they were not saved. Load the dense model, or undo with what `convert` returned"
    )


def _portable(config: STLConfig) -> STLConfig:
    """The config without the folder of its basis: that is of this machine, and nobody else's business."""
    name = config.basis if config.basis in NAMES else PurePath(config.basis).name
    return config if name == config.basis else replace(config, basis=name)


def _kind(number: int, record: object) -> Kind:
    if not isinstance(record, Mapping) or record.get("layer") not in _LAYERS:
        raise CheckpointError(f"quantization_config: kind {number} names none of {', '.join(_LAYERS)}: {record!r}")
    try:
        return Kind(record["layer"], STLConfig.from_dict({k: v for k, v in record.items() if k != "layer"}))
    except ConfigError as error:
        raise CheckpointError(f"quantization_config: kind {number}: {error}") from error
