"""The record of a conversion in the configs of transformers' models, each of which may be saved, or loaded, by itself."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import PreTrainedModel

from strassen_tile.baselines import LowRankLinear, MixedLinear, MonarchLinear, RotatedLinear, Sparse24Linear
from strassen_tile.convert.record import QUANT_METHOD, Record
from strassen_tile.errors import ConversionError
from strassen_tile.integrations.quantization import STLQuantConfig
from strassen_tile.nn.base import TileLayer

_UNKNOWN = (LowRankLinear, MixedLinear, MonarchLinear, RotatedLinear)


def skipped_in(config: PreTrainedConfig) -> dict[str, str]:
    """Name → why that layer is dense, as far as a config has it written down."""
    known = getattr(config, "quantization_config", None)
    return known.record.skipped if isinstance(known, STLQuantConfig) and known.record is not None else {}


def write_down(model: nn.Module, skipped: Mapping[str, str]) -> None:
    """Bring the configs of the transformers models in `model` up to date with the layers that it has now.

    Args:
        model: with or without such models inside.
        skipped: name → why that layer is dense, besides what is written down already.
    """
    done: set[int] = set()
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
    for name, part in parts:
        if not any(_inside(name, outer) for outer, _ in parts):
            _give_own_configs(part)
    for name, part in parts:
        if id(part.config) in done or not _is_ours(part.config):
            continue
        done.add(id(part.config))
        prefix = f"{name}." if name else ""
        why = skipped_in(part.config) | {
            layer.removeprefix(prefix): text for layer, text in skipped.items() if layer.startswith(prefix)
        }
        if (record := Record.of(part)) is not None:
            kept = {layer: text for layer, text in why.items() if layer not in record.layers}
            part.config.quantization_config = STLQuantConfig.of(Record(record.layers, kept, part=bool(name)))
        elif hasattr(part.config, "quantization_config"):
            del part.config.quantization_config


def with_record(save: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained` that writes down first what the model is then: an inner model may have been converted by itself, or
    layers put in by hand.
    """

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **options: Any) -> Any:
        _refuse_unknown(self)
        write_down(self, {})
        if _would_be_merged(self):  # Ŵ of q, k and v are no parts of one matrix
            options["save_original_format"] = False
        return save(self, *args, **options)

    return save_pretrained


def _refuse_unknown(model: nn.Module) -> None:
    """Raise ConversionError where the folder would come back as another model, with random layers in place of these."""
    found = {
        type(layer).__name__: name
        for name, layer in model.named_modules()
        if isinstance(layer, _UNKNOWN) or (isinstance(layer, Sparse24Linear) and layer.fixed_mask is None)
    }
    if found:
        layers = ", ".join(f"{kind} ({name})" for kind, name in found.items())
        raise ConversionError(
            f"{type(model).__name__} has layers that from_pretrained has no classes for: {layers}. Save its state_dict, or "
            "give it dense or STL layers first (Sparse24Linear.to_linear)"
        )


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _is_ours(config: PreTrainedConfig) -> bool:
    """Whether what stands there, if anything does, is the record of a conversion."""
    known = getattr(config, "quantization_config", None)
    method = known.get("quant_method") if isinstance(known, Mapping) else getattr(known, "quant_method", None)
    return known is None or method == QUANT_METHOD


def _give_own_configs(model: PreTrainedModel) -> None:
    """Let `model` and those inside have copies of their configs if a record is to be put in, or out: other models, dense
    ones, may have been built of the same.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    written = (isinstance(getattr(part.config, "quantization_config", None), STLQuantConfig) for part in parts)
    if all(there == (Record.of(part) is not None) for there, part in zip(written, parts, strict=True)):
        return
    copies: dict[int, PreTrainedConfig] = {}
    held = [part.config for part in parts]  # alive as long as their ids are used
    for config in held:
        _copy(config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])


def _copy(config: PreTrainedConfig, copies: dict[int, PreTrainedConfig]) -> PreTrainedConfig:
    """A copy of `config` and of those in it; one that two share is shared by their copies."""
    if id(config) not in copies:
        copies[id(config)] = own = copy.copy(config)
        for name, value in list(vars(own).items()):
            if isinstance(value, PreTrainedConfig):
                vars(own)[name] = _copy(value, copies)
    return copies[id(config)]


def _would_be_merged(model: PreTrainedModel) -> bool:
    """Whether `save_pretrained` would put tensors of STL layers together, as it does those of the dense ones, for the format
    that the model was published in.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TileLayer)}
    if not layers:
        return False
    known: Iterable[Any] = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(
        model, add_legacy=False
    )
    merging = [one.reverse_transform() for one in known if isinstance(one, WeightConverter)]
    names = [f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()]
    return any(one.rename_source_key(name)[1] is not None for one in merging for name in names)
