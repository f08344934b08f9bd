"""A pretrained model, tried before anything is made of it: that it runs on tokens, is whole, and is the one it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from strassen_tile.errors import ConfigError
from strassen_tile.integrations.pretrained import Pretrained
from strassen_tile.integrations.sentences import embed
from strassen_tile.nn.base import TileLayer

_ASIDE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}  # of a config


def try_out(found: Pretrained, context: int) -> None:
    """Run it on a piece; freeze what its outputs do not depend on (a pooler), for which several processes would wait in vain.

    Args:
        found: in eval mode.
        context: tokens of a piece.

    Raises:
        ConfigError: it has STL layers already, too few positions, weights that its files lack or that are not finite; or it
            does not run.
    """
    said, model = f"model={found.name}", found.model
    if any(isinstance(module, TileLayer) for module in model.modules()):
        raise ConfigError(f"{said}: has STL layers already; give the dense model")
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and context > most:
        raise ConfigError(f"{said}: has {most} positions, and context={context}; take at most as many")
    try:
        ids = torch.arange(context, device=next(model.parameters()).device)[None] % _rows(model)
        with torch.set_grad_enabled(not found.decodes):
            outputs = _outputs(found, ids)
    except Exception as error:  # whatever a model can do with tokens alone
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{said}: does not run on pieces of {context} tokens ({type(error).__name__}: {why})"
        ) from error
    if not bool(outputs.isfinite().all()):
        raise ConfigError(f"{said}: its own outputs are not finite: its weights are damaged")
    unused = set() if found.decodes else _freeze_unused(model, outputs)
    if missing := sorted(set(found.missing) - unused):
        raise ConfigError(
            f"{said}: its files lack {len(missing)} tensors, which would be random ({', '.join(missing[:3])} …): they are of "
            "another kind of model, or of one that from_pretrained cannot read"
        )


def _outputs(found: Pretrained, ids: Tensor) -> Tensor:
    if found.decodes:
        return found.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]
    return embed(found.model, ids, torch.ones_like(ids))


def _freeze_unused(model: nn.Module, outputs: Tensor) -> set[str]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(outputs.sum(), list(trained.values()), allow_unused=True)
    unused = {name for name, grad in zip(trained, grads, strict=True) if grad is None}
    for name in unused:
        trained[name].requires_grad_(False)
    return unused


def check_tokens(found: Pretrained, texts: Iterable[Tensor]) -> None:
    """Raise ConfigError where a token has no embedding."""
    rows = _rows(found.model)
    most = max((int(tokens.max()) for tokens in texts if len(tokens)), default=0)
    if most >= rows:
        raise ConfigError(
            f"model={found.name}: its tokenizer does not fit: the text has a token {most}, and there are {rows} embeddings"
        )


def _rows(model: Any) -> int:
    return len(model.get_input_embeddings().weight)


def digest(model: Any) -> str:
    """Of all weights, and of the config as far as it says what is computed with them."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _ASIDE}
    found = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
