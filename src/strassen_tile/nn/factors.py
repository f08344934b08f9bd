"""The factors that a layer is a product of: their names and fan-ins, weight normalisation, and a start at zero.

An STL layer is a chain of three: encode with E, multiply with Ŵ, decode with D. Layers of other kinds take part by having
what `Factored` asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from strassen_tile.errors import ConfigError
from strassen_tile.nn.linear import STLLinear
from strassen_tile.tiling import tile_count


@runtime_checkable
class Factored(Protocol):
    """A layer (…, K) → (…, M) made of several trained factors, first to last."""

    in_features: int

    def factor_fan_ins(self) -> Mapping[str, int]:
        """Name of the factor's parameter ("encoder", "first.weight") → how many numbers are summed for one that it makes."""


def factor_fan_ins(layer: nn.Module) -> dict[str, int] | None:
    """The factors of a layer in the order they are applied, each with its fan-in; None if it is not made of factors.

    For an STL layer pq of E, ⌈K/q⌉ of Ŵ, r of D. (Causal masks leave some terms fewer; that is not counted.)
    """
    if isinstance(layer, STLLinear):
        (p, q, _), r = layer.config.pqs, layer.config.rank
        return {"encoder": p * q, "encoded_weight": tile_count(layer.in_features, q), "decoder": r}
    return dict(layer.factor_fan_ins()) if isinstance(layer, Factored) else None


def parameter_of(layer: nn.Module, name: str) -> nn.Parameter:
    """What is trained under that (dotted) name: under weight normalisation the direction, else the original."""
    return _originals(layer, name)[-1]


def _originals(layer: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameter of that (dotted) name, or those it is made of: of weight normalisation, norm and direction."""
    path, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(path)
    if not is_parametrized(owner, leaf):
        return [cast(nn.Parameter, getattr(owner, leaf))]
    chain = cast(nn.ModuleDict, owner.parametrizations)[leaf]
    return [parameter for key, parameter in chain.named_parameters(recurse=False) if key.startswith("original")]


def gains(model: nn.Module) -> set[int]:
    """Ids of the parameters that are norms under weight normalisation: scales, not matrices, whatever their shape."""
    chains = [dict(m.named_parameters(recurse=False)) for m in model.modules() if isinstance(m, ParametrizationList)]
    pairs = [(chain["original0"], chain["original1"]) for chain in chains if "original1" in chain]
    return {id(norm) for norm, direction in pairs if norm.numel() < direction.numel()}


def normalise_weights(model: nn.Module, per: Literal["term", "layer"] = "term") -> list[str]:
    """Weight normalisation (Salimans and Kingma 2016) of Ŵ in every STL layer: Ŵ = g·V/‖V‖, the same numbers at first.

    The layers are trained and run as before, each in `torch.nn.utils.parametrize`'s hands: a state dict then holds
    `parametrizations.encoded_weight.original0` (g) and `original1` (V), `reset_parameters` no longer reaches Ŵ, and
    an MLP runs layer by layer. Qiu et al. (arXiv 2406.06248) do something else under this name: they cap the mean square
    of a factor at that of its start.

    Args:
        model: any module; do this after `convert` and before the optimizer is made.
        per: "term" for a norm of each of the r terms, "layer" for one norm.

    Returns:
        Names of the layers; those that already are normalised are left alone and not among them.

    Raises:
        ConfigError: `per` is neither, there is no STL layer, or a norm is zero: that has no direction.
    """
    if per not in ("term", "layer"):
        raise ConfigError(f"per must be one of term, layer; got {per!r}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, STLLinear)}
    if not layers:
        raise ConfigError("the model has no STLLinear whose weight could be normalised; convert it first")
    done = [name for name, layer in layers.items() if not is_parametrized(layer, "encoded_weight")]
    for name in done:
        weight = layers[name].encoded_weight
        if not bool((weight.flatten(1) if per == "term" else weight.flatten()).norm(dim=-1).all()):
            raise ConfigError(
                f"{name or 'the layer'} has a Ŵ or a term of it that is zero; normalise before it is made so"
            )
    for name in done:
        weight_norm(layers[name], "encoded_weight", dim=0 if per == "term" else None)  # type: ignore[arg-type]
    return done


def _weights(module: nn.Module) -> list[str]:
    factors = factor_fan_ins(module)
    return ["weight"] if factors is None and isinstance(module, nn.Linear) else list(factors or ())


@torch.no_grad()
def zero_last(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Start the last layers of residual branches at zero, so that each branch starts as none (Qiu et al., §4).

    Of a layer of factors the last that is trained is zeroed: D, or Ŵ where D is fixed; the others then learn from the
    second step on. Of an `nn.Linear` it is the weight. Biases become zero too.

    Args:
        model: any module, dense or converted.
        patterns: names of layers as in `fnmatch`: ["blocks.*.attn.proj", "blocks.*.mlp.fc2"] for a T2T-ViT.
            (A layer inside a wrapper has a longer name: "blocks.*.mlp.fc2*" finds it, too.)

    Returns:
        Names of the layers zeroed.

    Raises:
        ConfigError: a pattern that no linear layer's name matches, or a layer none of whose factors is trained.
    """
    if isinstance(patterns, str):
        raise ConfigError(f"patterns must be a list of names, [{patterns!r}]; got the string alone")
    layers: dict[str, list[str]] = {}
    inside: set[nn.Module] = set()  # parts of a layer of factors are no layers of their own
    for name, module in model.named_modules():
        if module not in inside and (names := _weights(module)):
            layers[name] = names
            inside |= set(module.modules())
    chosen = {pattern: [name for name in layers if fnmatchcase(name, pattern)] for pattern in patterns}
    if idle := [pattern for pattern, names in chosen.items() if not names]:
        raise ConfigError(f"no linear layer is called {', '.join(idle)}; there are {', '.join(layers) or 'none'}")
    found = list(dict.fromkeys(name for names in chosen.values() for name in names))
    last: dict[str, nn.Parameter] = {}
    for name in found:
        factors = [_originals(model.get_submodule(name), one) for one in layers[name]]
        trained = [parts[0] for parts in factors if parts[0].requires_grad]  # of a normalised one the norm
        if not trained:
            raise ConfigError(f"{name} would be zero for good: no factor of it is trained")
        last[name] = trained[-1]
    for name, parameter in last.items():
        parameter.zero_()
        layer = model.get_submodule(name)
        for owner in {"", *(one.rpartition(".")[0] for one in layers[name])}:
            if isinstance(bias := getattr(layer.get_submodule(owner), "bias", None), nn.Parameter):
                bias.zero_()
    return found
