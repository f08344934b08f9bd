"""Which linear layers of a model may be replaced, as far as the model says without being run; every other one gets a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from strassen_tile.convert.observe import Calls
from strassen_tile.errors import ConversionError
from strassen_tile.nn.base import TileLayer

Filter = Callable[[nn.Module, str], bool]
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


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The parent of the module of that name, and what it calls it. (Names of children may hold dots.)"""
    for prefix, parent in model.named_modules(remove_duplicate=False):
        for child in parent._modules:
            if (f"{prefix}.{child}" if prefix else child) == name:
                return parent, child
    raise ConversionError(f"{type(model).__name__} has no module {name!r}")


def at(model: nn.Module, name: str) -> nn.Module:
    """The module of that name."""
    parent, child = place_of(model, name)
    module = parent._modules[child]
    assert module is not None
    return module


def reasons(
    model: nn.Module,
    found: list[Candidate],
    *,
    filter_fn: Filter | None,
    calls: Mapping[str, Calls] | None,
    mixes_rows: bool,
) -> dict[str, str]:
    """Candidate name → why it is not replaced. What is missing here is replaced."""
    owners = _parameter_owners(model)
    heads = _output_layers(model)
    elsewhere = _held_elsewhere(model)
    skipped = {}
    for candidate in found:
        reason = _reason(candidate, owners, elsewhere) or _choice(candidate, heads, filter_fn, calls, mixes_rows)
        if reason:
            skipped[candidate.name] = reason
    return skipped


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
    """Why nothing can stand in for the layer."""
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


def _choice(
    candidate: Candidate,
    heads: set[int],
    filter_fn: Filter | None,
    calls: Mapping[str, Calls] | None,
    mixes_rows: bool,
) -> str | None:
    """Why the layer is not to be replaced, though it could."""
    name = candidate.name
    if filter_fn is not None:
        if not filter_fn(candidate.layer, name):
            return "excluded by filter_fn"
    elif id(candidate.layer) in heads or any(part in _HEADS for part in name.split(".")[-2:]):
        return "a head: it makes the model's output"
    if calls is None:
        return None
    observed = calls[name]
    if not observed.shapes:
        return "not called on the example inputs"
    if filter_fn is None and observed.is_output:
        return "a head: it makes the model's output"
    if mixes_rows and any(len(shape) < 3 for shape in observed.shapes):
        shape = next(shape for shape in observed.shapes if len(shape) < 3)
        return f"fed a 2-D input {shape}, whose rows are a batch"
    return None


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _output_layers(model: nn.Module) -> set[int]:
    """The output embeddings that transformers' models name."""
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if callable(getter) else None
    return set() if layer is None else {id(layer)}


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
