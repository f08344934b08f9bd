"""`check_mixing`: whether the row-mixing layers of a model, converted or built by hand, let something be seen that must not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from strassen_tile.convert.influence import Mixing
from strassen_tile.convert.interference import hazards
from strassen_tile.convert.running import guinea_pig
from strassen_tile.convert.select import place_of
from strassen_tile.convert.survey import mixing_of, survey
from strassen_tile.convert.verify import surprise
from strassen_tile.errors import ConversionError
from strassen_tile.nn import STLConfig
from strassen_tile.nn.base import TileLayer


@dataclass(frozen=True)
class MixingReport:
    """What `check_mixing` found. True if nothing is wrong.

    Attributes:
        safe: the layers whose rows meet nothing that the model, with rows apart, does not let them meet.
        unsafe: name → what a row, or an output, would see. "" stands for the model as a whole.
    """

    safe: list[str]
    unsafe: dict[str, str]

    def __bool__(self) -> bool:
        return not self.unsafe

    def __str__(self) -> str:
        head = f"{len(self.safe)} layers whose rows may mix, {len(self.unsafe)} whose rows must not"
        lines = [f"{name or 'the model'}: {why}" for name, why in self.unsafe.items()]
        return "\n".join([head, *lines])


def check_mixing(
    model: nn.Module, example_inputs: object, config: STLConfig | None = None, *, effort: int = 1
) -> MixingReport:
    """Whether rows mix in `model` that would not meet if its layers kept rows apart: the test that `convert` makes.

    Copies of the model are run with parts of the inputs changed, with its row-mixing layers (`STLLinear`, `STLLinearFP8`, alone
    or in an `STLMLP`) and with layers in their place that keep rows apart. Nothing may depend on more with them than without.

        assert st.check_mixing(model, tokens)  # in a test of yours

    Args:
        model: left as it is. Without row-mixing layers, the question is which of its linear layers `convert` could give some.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments; two samples or more, a few tiles long.
        config: for a model without row-mixing layers: that of the conversion asked about; `STLConfig()` by default.
        effort: how many times as many places of the inputs are changed as usual. More find rarer dependences.

    Raises:
        ConversionError: there is nothing to check, or the model's outputs cannot be compared from run to run.
    """
    if not isinstance(effort, int) or effort < 1:
        raise ConversionError(f"effort is a whole number from 1; got {effort!r}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, TileLayer) and m.config.mixes_rows}
    if not layers:
        return _ahead(model, example_inputs, config or STLConfig(), effort)
    mixing = {name: Mixing(m.config.pqs[0], m.config.mixing == "causal") for name, m in layers.items()}
    with guinea_pig(model) as double:
        _keep_apart(double, layers)
        linears = {name: m for name, m in double.named_modules() if isinstance(m, nn.Linear)}
        unsafe = {
            name: danger.reason
            for name, danger in hazards(double, linears, mixing, example_inputs, effort=effort).items()
        }
    if not unsafe:
        with guinea_pig(model) as apart, guinea_pig(model) as mixed:
            _keep_apart(apart, layers)
            danger = surprise(apart, mixed, example_inputs, effort=effort)
        if danger is not None:
            unsafe[""] = danger.reason
    return MixingReport([name for name in layers if name not in unsafe], unsafe)


def _ahead(model: nn.Module, example_inputs: object, config: STLConfig, effort: int) -> MixingReport:
    mixing = mixing_of(config)
    if mixing is None:
        raise ConversionError("the model has no row-mixing layer, and the config does not mix rows: nothing to check")
    plan = survey(model, example_inputs=example_inputs, mixing=mixing, effort=effort)
    return MixingReport([candidate.name for candidate in plan.chosen], plan.dangers)


def _keep_apart(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put dense layers of the same sizes where the row-mixing ones are; shared ones stay shared."""
    made: dict[int, nn.Module] = {}
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, TileLayer)
        like = next(t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point())
        dtype = like.dtype if like.dtype.itemsize > 1 else torch.float32
        if id(layer) not in made:
            made[id(layer)] = nn.Linear(layer.in_features, layer.out_features, device=like.device, dtype=dtype)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            parent, child = place_of(model, name)
            parent._modules[child] = made[id(module)]
