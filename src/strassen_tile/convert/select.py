"""Which linear layers of a model may be replaced; every other one gets a reason."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import nn

from strassen_tile.convert.observe import Calls
from strassen_tile.nn.base import TileLayer

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
    sequence_first = _sequence_first(model)
    skipped = {}
    for candidate in found:
        reason = _reason(candidate, owners, heads, filter_fn, calls, mixes_rows)
        unseen = calls is None or calls[candidate.name].shares_rows is None
        if reason is None and mixes_rows and unseen and within(candidate.name, sequence_first):
            reason = "its attention has batch_first=False: dimension −2 of its input holds rows of several samples"
        if reason:
            skipped[candidate.name] = reason
    return skipped


def others(model: nn.Module) -> dict[str, str]:
    """Modules that multiply by a matrix but are no `nn.Linear`, with the reason why they are left as they are."""
    found = {}
    for name, module in model.named_modules():
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


def causal_parts(model: nn.Module) -> set[str]:
    """Names of the parts of a model that say of themselves that a row must not see later ones; "" is all of it."""
    parts = set()
    for name, module in model.named_modules():
        decoder = getattr(getattr(module, "config", None), "is_decoder", False) is True
        language = type(module).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        if decoder or language or isinstance(module, nn.TransformerDecoder | nn.TransformerDecoderLayer):
            parts.add(name)
        elif getattr(module, "is_causal", False) is True:  # transformers' attention: the block around it
            parts.add(name.rpartition(".")[0])
    return parts


def within(name: str, parts: Collection[str]) -> bool:
    """Whether the module of that name lies in one of the parts."""
    return any(part in ("", name) or name.startswith(f"{part}.") for part in parts)


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
    if any(name not in layer._parameters for name in ("weight", "bias")):
        return "its weight is made from other parameters (weight_norm, pruning or the like)"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer):
        return "has hooks or a forward of its own, which would be lost"
    for kind, parameter in layer._parameters.items():
        tied = [owner for owner in owners.get(id(parameter), []) if owner.rpartition(".")[0] not in candidate.names]
        if tied:
            return f"its {kind} is tied to {tied[0]}"
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


def _sequence_first(model: nn.Module) -> set[str]:
    """The blocks around attention that takes (N, B, K)."""
    attention = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    return {name.rpartition(".")[0] for name, module in attention if not module.batch_first}


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
