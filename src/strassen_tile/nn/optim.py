"""Parameter groups for an optimiser: what decays, and which learning rate each factor takes.

The rates of factor_lr="fan_in" (after Qiu et al., arXiv 2406.06248; docs/learning_rates.md has the steps and what was
measured). Adam moves every entry by about η, whatever the gradient's size. A matrix of fan-in d whose entries move by η
with the signs of an input x changes its output by about η·d·|x|: a dense layer by ηK|x|. The operator is a chain,

    X̂[k] = ⟨E_k, X⟩ (fan-in pq),   Ŷ[k] = X̂[k] Ŵ[k] (fan-in K/q),   Y = Σ_k Ŷ[k] D_k (fan-in r),

whose factors start such that |X̂| ≈ |X| and |Y| ≈ |Ŷ|, so a relative change made in one reaches Y at most whole. With n
factors trained, each may do 1/n of what the dense layer does: η_f·d_f = ηK/n. Frozen factors leave more to the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from strassen_tile.errors import ConfigError
from strassen_tile.nn.factors import factor_fan_ins, gains, parameter_of
from strassen_tile.nn.linear import STLLinear
from strassen_tile.tiling import as_integer

FactorLR = Literal["one", "fan_in"]
_ONE = Fraction(1)


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    encoder_lr: float | None = None,
    factor_lr: FactorLR = "one",
    base_width: int | None = None,
) -> list[dict[str, Any]]:
    """Groups for `torch.optim` optimisers; every trainable parameter is in exactly one.

    "weights": matrices, dense and encoded, with `weight_decay`. "encoders": encoders and decoders of STL layers, no
    decay (they are a change of basis: shrinking them only rescales the layer), at `encoder_lr`. "rest": biases, norms
    and other vectors, no decay. Where a multiple of the rate applies, the group's name says which: "weights × 4/3".
    AdamW multiplies the decay by a group's rate, so it is multiplied along.

    Args:
        model: any module.
        lr: of weights and rest.
        weight_decay: of weights.
        encoder_lr: of encoders; `lr` by default.
        factor_lr: "one" rate for all factors of a layer, or by "fan_in": K/(pq·n) times `lr` for E, K/(⌈K/q⌉·n) (about q/n)
            for Ŵ, K/(r·n) for D, n the number of the three that are trained; likewise for the factors of other layers
            (`nn.factors.Factored`).
        base_width: the smallest width among models that are to share one `lr`, the width it was found at. Matrices of
            fan-in K above it take base_width/K times their rate, as in μP (Yang et al., arXiv 2203.03466), dense ones as
            well: linear, convolution and attention weights, and of an STL layer Ŵ, by the layer's K. By "one" E and D
            keep their rate, as their fan-ins do not grow; by "fan_in" it comes to base_width/(pq·n) and base_width/(r·n) of
            `lr`. Matrices of a smaller fan-in keep their rate, as input layers should; an input layer of a larger one
            takes a multiple that no width changes. Vectors, embeddings and whatever else is no product keep theirs.

    A parameter that several layers share takes the lowest of the rates it would have in each.

    Raises:
        ConfigError: a negative rate or decay, another rule, encoder_lr beside factor_lr="fan_in", a base_width that is
            no positive integer, or a model without trainable parameters.
    """
    if min(lr, weight_decay, encoder_lr or 0.0) < 0:
        raise ConfigError(f"rates must be >= 0; got lr={lr}, weight_decay={weight_decay}, encoder_lr={encoder_lr}")
    if factor_lr not in get_args(FactorLR):
        raise ConfigError(f"factor_lr must be one of {', '.join(get_args(FactorLR))}; got {factor_lr!r}")
    if factor_lr != "one" and encoder_lr is not None:
        raise ConfigError(
            f"encoder_lr={encoder_lr} is one rate for all encoders, factor_lr={factor_lr!r} gives each its own: drop one"
        )
    if base_width is not None and (as_integer(base_width) or 0) < 1:
        raise ConfigError(f"base_width must be a positive integer, or None; got {base_width!r}")
    multiples = dict(_lowest(model, factor_lr, base_width))
    scales = gains(model)
    factors = {
        id(parameter_of(m, name))
        for m in model.modules()
        if isinstance(m, STLLinear)
        for name in ("encoder", "decoder")
    }
    members: dict[tuple[str, Fraction], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in scales
            kind = "encoders" if id(parameter) in factors else "weights" if matrix else "rest"
            members.setdefault((kind, multiples.get(id(parameter), _ONE)), []).append(parameter)
    if not members:
        raise ConfigError("the model has no trainable parameters")
    rates = {"weights": lr, "encoders": lr if encoder_lr is None else encoder_lr, "rest": lr}
    return [
        {
            "name": kind if multiple == 1 else f"{kind} × {multiple}",
            "params": params,
            "lr": rates[kind] * float(multiple),
            "weight_decay": weight_decay if kind == "weights" else 0.0,
        }
        for wanted in rates
        for (kind, multiple), params in members.items()
        if kind == wanted
    ]


def _lowest(model: nn.Module, factor_lr: FactorLR, base_width: int | None) -> dict[int, Fraction]:
    """Id of a parameter → the multiple of the rate it takes, the lowest of its places."""
    found: dict[int, Fraction] = {}
    inside: set[nn.Module] = set()  # parts of a layer of factors, which has said what they take
    for module in model.modules():
        if module in inside:
            continue
        if factor_fan_ins(module) is not None:
            inside |= set(module.modules())
        for parameter, multiple in _of_module(module, factor_lr, base_width):
            found[id(parameter)] = min(multiple, found.get(id(parameter), multiple))
    return found


def _of_module(
    module: nn.Module, factor_lr: FactorLR, base_width: int | None
) -> Iterator[tuple[nn.Parameter, Fraction]]:
    def narrowed(fan_in: int) -> Fraction:
        return _ONE if base_width is None else min(_ONE, Fraction(int(base_width), max(1, fan_in)))

    fan_ins = factor_fan_ins(module)
    if fan_ins is not None:
        features: int = module.in_features  # type: ignore[assignment]
        trained = [(name, p) for name in fan_ins if (p := parameter_of(module, name)).requires_grad]
        for name, parameter in trained:
            fixed = isinstance(module, STLLinear) and name != "encoded_weight"
            if factor_lr == "fan_in":
                share = Fraction(max(1, features), max(1, fan_ins[name])) / len(trained)
                yield parameter, narrowed(features) * share
            else:
                yield parameter, _ONE if fixed else narrowed(features)
        return
    names: tuple[str, ...] = ()
    if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)):
        names = ("weight",)
    elif isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    for name in names:
        if getattr(module, name) is not None:
            parameter = parameter_of(module, name)
            yield parameter, narrowed(math.prod(parameter.shape[1:]))
