"""Causal language models of transformers, by name: shapes of Llama, GPT-NeoX and Qwen3 from about 1 M parameters on.

Of byte-level models nearly all parameters are in the blocks; with a tokenizer, embedding and head come on top.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from strassen_tile.errors import ConfigError


@dataclass(frozen=True)
class _Size:
    """Width, blocks, width of a head, and of each MLP as a multiple of the width."""

    width: int
    blocks: int
    head: int
    mlp: float
    kv_heads: int | None = None


# An MLP of Llama has three layers, of GPT-NeoX two: with 8/3 and 4 they have as many parameters.
_CPU = {"1m": (128, 5, 32), "3m": (256, 4, 32), "10m": (384, 6, 64), "30m": (640, 6, 64)}
_SIZES: dict[str, _Size] = {
    **{
        f"{family}-{name}": _Size(*size, mlp=4 if family == "neox" else 8 / 3)
        for family in ("llama", "neox", "qwen3")
        for name, size in _CPU.items()
    },
    "llama-160m": _Size(768, 12, 64, 8 / 3),
    "neox-160m": _Size(768, 12, 64, 4),
    "llama-1b": _Size(2048, 22, 64, 2.75, kv_heads=4),  # TinyLlama
}
MODELS = tuple(_SIZES)
BLOCKS = ("LlamaDecoderLayer", "GPTNeoXLayer", "Qwen3DecoderLayer")


def architecture(model: str) -> str:
    """The model's name, or the digest of the config that the path leads to, of which a `decoder` has been made."""
    if model in _SIZES:
        return model
    path = Path(model)
    return hashlib.sha256((path / "config.json" if path.is_dir() else path).read_bytes()).hexdigest()[:16]


def decoder(
    model: str,
    *,
    vocabulary: int,
    context: int,
    width: int | None = None,
    blocks: int | None = None,
    init_range: float | None = None,
) -> nn.Module:
    """A causal language model with weights from torch's global generator.

    Args:
        model: one of `MODELS`, or the path of a transformers `config.json` (or its folder).
        vocabulary: tokens there are.
        context: tokens that a sequence has at most.
        width: of a token, where it is not the model's own; heads keep theirs, so that it is a multiple of that.
        blocks: there are, where they are not as many as the model's own.
        init_range: standard deviation of the weights at the start; None: the family's (0.02).

    Raises:
        ConfigError: no such model, a width that its heads do not divide, or width or blocks for a config file.
    """
    from transformers import AutoModelForCausalLM

    for said, value in {"width": width, "blocks": blocks}.items():
        if model not in _SIZES and value is not None:
            raise ConfigError(f"{said}={value} is for models by name ({', '.join(MODELS)}); change it in {model}")
    config = _from_file(model) if model not in _SIZES else _config(model, width, blocks)
    config.vocab_size, config.use_cache = vocabulary, False
    config.max_position_embeddings = max(
        context, getattr(config, "max_position_embeddings", 0) if model not in _SIZES else 0
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    if init_range is not None:
        config.initializer_range = init_range
    try:
        made: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except Exception as error:  # whatever a config can do wrong
        raise ConfigError(f"model={model}: cannot be made ({type(error).__name__}: {error})") from error
    return made


def _config(model: str, width: int | None, blocks: int | None) -> Any:
    import transformers as hf

    size = _SIZES[model]
    width = size.width if width is None else width
    if width < size.head or width % size.head:
        raise ConfigError(f"width must be a multiple of {size.head}, the width of a head of {model}; got {width}")
    heads = width // size.head
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": size.blocks if blocks is None else blocks,
        "num_attention_heads": heads,
        "intermediate_size": 16 * round(width * size.mlp / 16),
    }
    if model.startswith("neox"):
        return hf.GPTNeoXConfig(**sizes, attention_dropout=0.0, hidden_dropout=0.0)
    more = {"num_key_value_heads": size.kv_heads or heads, "head_dim": size.head, "tie_word_embeddings": False}
    return (hf.Qwen3Config if model.startswith("qwen3") else hf.LlamaConfig)(**sizes, **more)


def _from_file(model: str) -> Any:
    from transformers import AutoConfig

    if not Path(model).exists():
        raise ConfigError(f"there is no model {model!r}; there are {', '.join(MODELS)}, or the path of a config.json")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever a file can hold
        raise ConfigError(f"model={model}: no config of transformers ({type(error).__name__}: {error})") from error
