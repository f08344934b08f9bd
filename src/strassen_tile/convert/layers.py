"""The linear layers of a model, and why some cannot be replaced, as far as that shows without a run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strassen_tile.nn.base import TileLayer

_HEADS = {
    "head", "heads", "lm_head", "classifier", "classification_head", "score", "fc_out", "qa_outputs", "embed_out",
    "head_dist", "output_projection", "cls", "pre_classifier", "logits_proj", "output_layer",
}  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Candidate:
    """One `nn.Linear`-like module and all the names it goes by."""

    layer: nn.Linear
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def candidates(model: nn.Module) -> list[Candidate]:
    """Every linear layer once, with all its names (a module used in two places has two)."""
    names: dict[int, list[str]] = {}
    layers: dict[int, nn.Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            layers[id(module)] = module
            names.setdefault(id(module), []).append(name)
    return [Candidate(layer, tuple(names[key])) for key, layer in layers.items()]


def unfit(model: nn.Module, found: Sequence[Candidate]) -> dict[str, str]:
    """Candidate name → why nothing can stand in for the layer."""
    owners, elsewhere, adapted = _parameter_owners(model), _held_elsewhere(model), _adapted(model)
    checked = {
        candidate.name: "belongs to an adapter (PEFT); convert first, or merge_and_unload() and convert then"
        if any(name.startswith(prefix) for name in candidate.names for prefix in adapted)
        else _reason(candidate, owners, elsewhere)
        for candidate in found
    }
    return {name: reason for name, reason in checked.items() if reason is not None}


def heads(model: nn.Module, found: Sequence[Candidate]) -> set[str]:
    """The names of candidates that make the model's output, by what they or transformers call them."""
    getter = getattr(model, "get_output_embeddings", None)
    embeddings = getter() if callable(getter) else None
    return {c.name for c in found if c.layer is embeddings or any(part in _HEADS for part in c.name.split(".")[-2:])}


def others(model: nn.Module) -> dict[str, str]:
    """Modules that multiply by a matrix but are no `nn.Linear`, with the reason why they are left as they are."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if not any(outer == "" or name.startswith(f"{outer}.") for outer in found):
                found[name] = "is compiled by torch.jit; convert the model before that"
            continue
        weight = module._parameters.get("weight")
        if isinstance(module, TileLayer):
            found[name] = f"is an {type(module).__name__} already"
        elif isinstance(module, nn.MultiheadAttention):
            found[name] = "multiplies by its in_proj_weight itself; only nn.Linear modules are replaced"
        elif (
            weight is not None
            and weight.ndim == 2
            and not isinstance(module, nn.Linear | nn.Embedding | nn.EmbeddingBag)
        ):
            found[name] = f"is a {type(module).__name__}; only nn.Linear modules are replaced"
    return found


def _reason(candidate: Candidate, owners: Mapping[int, list[str]], elsewhere: Mapping[int, str]) -> str | None:
    layer = candidate.layer
    if type(layer) is not nn.Linear:
        return f"is a {type(layer).__name__}, whose owner may use its weight directly"
    if any(name not in layer._parameters for name in ("weight", "bias")):
        return "its weight is made from other parameters (weight_norm, pruning or the like)"
    if any(getattr(layer, hooks, None) for hooks in _HOOKS) or "forward" in vars(layer):
        return "has hooks or a forward of its own, which would be lost"
    if layer._compiled_call_impl is not None:
        return "has been compiled on its own (module.compile), which would be lost; compile the model afterwards"
    for kind, parameter in layer._parameters.items():
        if parameter is None:
            continue
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"its {kind} has gradient hooks, which would be lost"
        tied = [owner for owner in owners.get(id(parameter), []) if owner.rpartition(".")[0] not in candidate.names]
        if tied:
            return f"its {kind} is tied to {tied[0]}"
    if id(layer) in elsewhere:
        return f"is also held by {elsewhere[id(layer)]}, which would keep the dense layer"
    return None


def _adapted(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of what layers hold that PEFT has put in the place of others."""
    kinds = {
        name: any(base.__name__ == "BaseTunerLayer" and base.__module__.startswith("peft.") for base in type(m).__mro__)
        for name, m in model.named_modules(remove_duplicate=False)
    }
    return tuple(f"{name}." for name, adapts in kinds.items() if adapts)


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _held_elsewhere(model: nn.Module) -> dict[int, str]:
    """Linear layers, by id, that a module of the model holds other than as a child: where."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for attribute, value in vars(module).items():
            if attribute not in ("_modules", "_parameters", "_buffers"):
                for layer in _linears_in(value, depth=3):
                    found.setdefault(id(layer), f"{name}.{attribute}".lstrip("."))
    return found


def _linears_in(value: Any, depth: int) -> Iterator[nn.Linear]:
    """Linear layers in containers, partial functions and bound methods."""
    if isinstance(value, nn.Linear):
        yield value
    elif depth == 0 or isinstance(value, str | bytes | nn.Module | torch.Tensor):
        return
    elif isinstance(value, Mapping):
        for item in list(value.values()):
            yield from _linears_in(item, depth - 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in list(value):
            yield from _linears_in(item, depth - 1)
    elif isinstance(value, functools.partial):
        yield from _linears_in([value.func, *value.args, *value.keywords.values()], depth - 1)
    elif isinstance(getattr(value, "__self__", None), nn.Linear):
        yield value.__self__
