"""`convert(calibration=…)`: each layer is fitted to what it is fed, and nothing else of the model changes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from strassen_tile import STLConfig, convert
from strassen_tile.convert import running
from strassen_tile.errors import ConversionError

FIT = STLConfig(tile=4, rank=24, basis="approximate", init="fit")


def problem() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """A network on sequences whose features depend on each other, inputs to fit to, and others."""
    torch.manual_seed(0)
    mix = torch.randn(16, 16) * torch.logspace(0, -2, 16)
    x = torch.randn(40, 12, 16) @ mix
    x[:, 1:] += x[:, :-1]
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), x[:30], x[30:]


def lost(model: nn.Module, before: torch.Tensor, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - before).square().sum() / before.square().sum())


def everything(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear)


@pytest.mark.parametrize("scope", ["layer", "tile"])
def test_more_is_fitted_and_less_is_lost(scope: str) -> None:
    losses = []
    for options in ({}, {"rounds": 0}, {"rounds": 8}):
        model, rows, x = problem()
        before = model(x).detach()
        given = {"calibration": rows, **options} if options else {}
        convert(
            model,
            replace(FIT, encoder_scope=scope),
            example_inputs=x,
            filter_fn=everything,
            force_mixing=["*"],
            **given,
        )
        losses.append(lost(model, before, x))
    assert losses[2] < 0.7 * losses[1] < 0.7 * losses[0]


def test_layers_are_fitted_to_what_they_are_fed(monkeypatch) -> None:
    """Of the second layer that is what the first makes of it, not the model's input; and no more rows than fit."""
    model, rows, _ = problem()
    seen = running.inputs_of(model, [model[0], model[2]], rows)
    torch.testing.assert_close(seen[model[0]], rows)
    torch.testing.assert_close(seen[model[2]], torch.tanh(model[0](rows)))
    monkeypatch.setattr(running, "_MOST_ROWS", 50)
    assert running.inputs_of(model, [model[0]], rows)[model[0]].shape == (4, 12, 16)
    assert not model[0]._forward_pre_hooks


def test_masks_and_fixed_factors_stay() -> None:
    """Causal tiles keep their zeros, and what is not trained is not fitted either."""
    for config in (
        STLConfig(tile=4, rank=24, basis="random", init="fit", mixing="causal"),
        STLConfig(tile=4, rank=24, basis="approximate", init="fit", train_encoder=False),
    ):
        found = []
        for given in ({}, {"rounds": 5}):
            model, rows, x = problem()
            torch.manual_seed(1)
            calibration = {"calibration": rows, **given} if given else {}
            convert(model, config, example_inputs=x, filter_fn=everything, force_mixing=["*"], **calibration)
            found.append(model)
        assert torch.equal(found[0][0].encoder, found[1][0].encoder)
        assert not torch.equal(found[0][0].encoded_weight, found[1][0].encoded_weight)


def test_undo_and_dry_run() -> None:
    model, rows, x = problem()
    before = model(x).detach()
    convert(model, FIT, example_inputs=x, filter_fn=everything, force_mixing=["*"], calibration=rows, dry_run=True)
    assert torch.equal(model(x), before)
    convert(model, FIT, example_inputs=x, filter_fn=everything, force_mixing=["*"], calibration=rows).undo()
    assert torch.equal(model(x), before)


def test_noise_is_not_fitted() -> None:
    model, rows, x = problem()
    with pytest.raises(ConversionError, match="starts from noise"):
        convert(model, STLConfig(rank=24), example_inputs=x, filter_fn=everything, force_mixing=["*"], calibration=rows)
    assert type(model[0]) is nn.Linear
