"""Hugging Face transformers: converted models are saved by `save_pretrained` and come back from plain `from_pretrained`.

Registered there as the quantisation method "stl" as soon as both packages are imported. A conversion writes down in
`model.config.quantization_config` which layers it made; `save_pretrained` takes that along. Loading, STL layers are put into
the model while it is still on the meta device, and are filled like any others. Loaded, the model is an ordinary one: it
trains, casts and compiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from strassen_tile.convert import Conversion, convert
from strassen_tile.convert.record import QUANT_METHOD, Record, follow, tensors_wanted
from strassen_tile.convert.record import conversion_of as of_layers
from strassen_tile.convert.saving import check_files, stl_layers_in
from strassen_tile.convert.swap import changed, on_change
from strassen_tile.errors import CheckpointError
from strassen_tile.integrations.configs import skipped_in, with_record, write_down
from strassen_tile.integrations.quantization import STLQuantConfig

__all__ = ["STLQuantConfig", "STLQuantizer", "conversion_of"]


@register_quantizer(QUANT_METHOD)
class STLQuantizer(HfQuantizer):  # type: ignore[misc]
    """What `from_pretrained` calls for models whose config names "stl"."""

    quantization_config: STLQuantConfig

    def __init__(self, quantization_config: STLQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._conversion: Conversion | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        record = self.quantization_config.record
        if not self.pre_quantized:
            return model
        if record is None:
            raise CheckpointError(
                "quantization_config in config.json has no layers: it was not saved with a converted model"
            )
        places = _places(model, record)
        check_files(record, [name for name, here in places.items() if here is not None], checkpoint_files or [])
        self._conversion = record.put_into(model, lambda name: places.get(name, name))
        stored, prefix = stl_layers_in(checkpoint_files or []), f"{model.base_model_prefix}."
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and stored & {name, name.removeprefix(prefix), prefix + name}:
                raise CheckpointError(
                    f"{name} is an STL layer in the checkpoint, and config.json has it as a dense one for "
                    f"{type(model).__name__}: load the class that was saved"
                )
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # From here on it is a model like others: transformers forbids what a model of packed integers could not do.
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        if self._conversion is None:
            del model.config.quantization_config
            convert(model, self.quantization_config.config, **self.quantization_config.options)
            return model
        if missing := _not_loaded(model, self._conversion):
            raise CheckpointError(
                f"the checkpoint has no {', '.join(missing[:4])}, {len(missing)} tensors in all; it is damaged"
            )
        follow(model, self._conversion)
        changed(model, self._conversion.skipped)  # of this class, which may lack parts that the checkpoint has
        return model

    def is_serializable(self) -> bool:
        """Whether it can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether it can be trained without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes it."""
        return True


def conversion_of(model: PreTrainedModel) -> Conversion:
    """What is known of a converted model, be it loaded: which layers, why others are dense, and the mask that they follow.

    Raises:
        CheckpointError: it has no STL layers.
    """
    return of_layers(model, skipped_in(model.config))


def _places(model: PreTrainedModel, record: Record) -> dict[str, str | None]:
    """Name of a layer in the record → the one that it has in this class of model, which may have a head around it, or none.

    Raises:
        CheckpointError: the model has none of them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix, outer = f"{model.base_model_prefix}.", _what_it_is_of(modules, record)
    places: dict[str, str | None] = {}
    for name in record.layers:
        names = [name, name.removeprefix(prefix), prefix + name, name.removeprefix(outer)]
        found = next((n for n in names if n in modules), None)
        places[name] = found if found is not None or _lacks_its_part(modules, names[:2]) else name
    if not any(place in modules for place in places.values()):
        raise CheckpointError(
            f"{type(model).__name__} has none of the {len(places)} layers that the checkpoint says are STL layers, such as "
            f"{next(iter(places))!r}: it is of another model"
        )
    return places


def _what_it_is_of(modules: Mapping[str, nn.Module], record: Record) -> str:
    """The part of the recorded model that this one is: "vision_model.", if that alone has all its layers here; or ""."""
    parts: dict[str, list[str]] = {}
    for name in record.layers:
        part, _, inner = name.partition(".")
        parts.setdefault(part, []).append(inner)
    whole = [part for part, inner in parts.items() if part not in modules and all(n and n in modules for n in inner)]
    return f"{whole[0]}." if len(whole) == 1 else ""


def _lacks_its_part(modules: Mapping[str, nn.Module], names: Sequence[str]) -> bool:
    """Whether the layer is of a part that the model does not have (another head, a decoder), and not just one too many."""
    for name in names:
        inner = name
        while inner and inner not in modules:
            inner, _, missing = inner.rpartition(".")
            if inner in modules and (missing.isdecimal() or f"{inner}.{missing}" == name):
                return False
    return True


def _not_loaded(model: nn.Module, conversion: Conversion) -> list[str]:
    """Names of tensors of STL layers that were not in the checkpoint: transformers marks what it has read."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    wanted = {name: tensors[name] for name in tensors_wanted(conversion)}
    read = {name for name, t in wanted.items() if t.is_meta or getattr(t, "_is_hf_initialized", False)}  # meta: on disk
    return [name for name in wanted if name not in read]


on_change(write_down)
PreTrainedModel.save_pretrained = with_record(PreTrainedModel.save_pretrained)
