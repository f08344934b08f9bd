"""Hugging Face transformers: converted models are saved by `save_pretrained` and come back from plain `from_pretrained`.

Registered there as the quantisation method "stl" as soon as both packages are imported. A conversion writes down in
`model.config.quantization_config` which layers it made; `save_pretrained` takes that along. Loading, STL layers are put into
the model while it is still on the meta device, and are filled like any others. Loaded, the model is an ordinary one: it
trains, casts and compiles.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from strassen_tile.convert import Conversion, convert
from strassen_tile.convert.record import FORMAT, QUANT_METHOD, Record, follow, tensors_wanted
from strassen_tile.convert.record import conversion_of as of_layers
from strassen_tile.convert.saving import check_files
from strassen_tile.convert.swap import changed, on_change
from strassen_tile.errors import CheckpointError, ConfigError
from strassen_tile.nn import STLConfig


@register_quantization_config(QUANT_METHOD)
class STLQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained(folder_of_a_dense_model, quantization_config=STLQuantConfig(…))` converts the model it loads.

    In a saved model's `config.json` it is the record of the layers that are there.

    Args:
        config: of the layers; `STLConfig()` by default.
        options: further arguments of `strassen_tile.convert`: example_inputs, filter_fn, layer_configs, force_mixing,
            min_speedup.
    """

    quant_method = QUANT_METHOD

    def __init__(self, config: STLConfig | None = None, **options: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.record: Record | None = None
        if options.pop("quant_method", None) is not None or "layers" in options:  # out of config.json
            self.record = Record.from_dict({"quant_method": QUANT_METHOD, **options})
            options = {}
        self.config, self.options = config or STLConfig(), options
        if not isinstance(self.config, STLConfig):
            raise ConfigError(f"config must be an STLConfig; got {config!r}")

    @classmethod
    def of(cls, record: Record) -> STLQuantConfig:
        """That of a model which is converted."""
        made = cls()
        made.record = record
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds."""
        if self.record is not None:
            return self.record.to_dict()
        return {"quant_method": QUANT_METHOD, "format": FORMAT, "config": self.config.to_dict()}

    def __deepcopy__(self, memo: dict[int, Any]) -> STLQuantConfig:
        made = type(self)(self.config, **self.options)  # example inputs and functions are nobody's to copy
        made.record = self.record
        return made


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
        names = {name: _here(model, name) for name in record.layers}
        check_files(record, [name for name, here in names.items() if here is not None], checkpoint_files or [])
        self._conversion = record.put_into(model, lambda name: _here(model, name))
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
    known = getattr(model.config, "quantization_config", None)
    return of_layers(
        model, known.record.skipped if isinstance(known, STLQuantConfig) and known.record is not None else {}
    )


def _write_down(model: nn.Module, skipped: Mapping[str, str]) -> None:
    """Bring the configs of the transformers models in `model` up to date: each may be saved by itself."""
    seen: set[int] = set()
    for outer, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module.config) in seen:
            continue
        config, prefix = module.config, f"{outer}." if outer else ""
        seen.add(id(config))
        before = getattr(config, "quantization_config", None)
        if before is not None and not isinstance(before, STLQuantConfig):
            continue
        old = before.record.skipped if before is not None and before.record is not None else {}
        why = old | {name.removeprefix(prefix): text for name, text in skipped.items() if name.startswith(prefix)}
        if (record := Record.of(module)) is not None:
            kept = {name: text for name, text in why.items() if name not in record.layers}
            config = _config_of_its_own(module) if before is None else config
            config.quantization_config = STLQuantConfig.of(Record(record.layers, kept))
            seen.add(id(config))
        elif before is not None:
            del config.quantization_config


def _config_of_its_own(model: PreTrainedModel) -> Any:
    """A copy of its config, put wherever the model holds it: other models, dense ones, may have been built of the same."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
    return own


def _here(model: PreTrainedModel, name: str) -> str | None:
    """The name that a layer of the checkpoint has in this class of model, which may have a head around it, or none."""
    prefix = f"{model.base_model_prefix}."
    names = [name, name.removeprefix(prefix), prefix + name]
    modules = dict(model.named_modules(remove_duplicate=False))
    found = next((n for n in names if n in modules), None)
    if found is None and not any(n.partition(".")[0] in modules for n in names[:2]):
        return None  # of a part that this class does not have: another head, a decoder
    return found or name


def _not_loaded(model: nn.Module, conversion: Conversion) -> list[str]:
    """Names of tensors of STL layers that were not in the checkpoint: transformers marks what it has read."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    wanted = {name: tensors[name] for name in tensors_wanted(conversion)}
    read = {name for name, t in wanted.items() if t.is_meta or getattr(t, "_is_hf_initialized", False)}  # meta: on disk
    return [name for name in wanted if name not in read]


on_change(_write_down)
