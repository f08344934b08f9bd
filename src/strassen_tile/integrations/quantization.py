"""The quantisation config of transformers that names STL layers, known there before any model is.

Whoever reads a `config.json` may ask for it ahead of models, as lm-evaluation-harness does: so it needs nothing of them.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from strassen_tile.convert.record import FORMAT, QUANT_METHOD, Record
from strassen_tile.errors import ConfigError
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
