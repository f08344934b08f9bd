"""Which linear layers of a model may be replaced; every other one gets a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from strassen_tile.convert.observe import Calls

Filter = Callable[[nn.Module, str], bool]
_HEADS = {
    "head", "heads", "lm_head", "classifier", "classification_head", "score", "fc_out", "qa_outputs", "embed_out",
    "head_dist", "output_projection", "cls", "pre_classifier", "logits_proj", "output_layer",
}  # fmt: skip


@dataclass(frozen=True)
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
    skipped = {}
    for candidate in found:
        reason = _reason(candidate, owners, heads, filter_fn, calls, mixes_rows)
        if reason:
            skipped[candidate.name] = reason
    return skipped


def _reason(
    candidate: Candidate,
    owners: Mapping[int, list[str]],
    heads: set[int],
    filter_fn: Filter | None,
    calls: Mapping[str, Calls] | None,
    mixes_rows: bool,
) -> str | None:
    layer, name = candidate.layer, candidate.name
    if type(layer) is not nn.Linear:
        return f"is a {type(layer).__name__}, whose owner may use its weight directly"
    others = [owner for owner in owners[id(layer.weight)] if owner.rpartition(".")[0] not in candidate.names]
    if others:
        return f"its weight is tied to {others[0]}"
    if hasattr(layer, "parametrizations"):
        return "its weight is parametrized"
    if filter_fn is not None:
        if not filter_fn(layer, name):
            return "excluded by filter_fn"
    elif id(layer) in heads or any(part in _HEADS for part in name.split(".")[-2:]):
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
    if mixes_rows and observed.shares_rows:
        return "dimension −2 of its input holds rows of several samples"
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
