"""For all tests of experiments: few images, and the seconds to find which rows may mix spent once a network."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from small_runs import few_images
from torch import nn

from strassen_tile.convert import select
from strassen_tile.convert.leaks import Leak, find_leaks
from strassen_tile.convert.perturb import Mixing
from strassen_tile.data import load_images

_known: dict[str, dict[str, Leak]] = {}


@pytest.fixture(autouse=True)
def _leaks_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may mix is a matter of the network's parts, not of its numbers; tests/convert looks at that each time."""

    def remembered(
        model: nn.Module, layers: Mapping[str, nn.Module], mixing: Mapping[str, Mixing], inputs: object, **how: object
    ) -> dict[str, Leak]:
        if not isinstance(inputs, torch.Tensor):
            return find_leaks(model, layers, mixing, inputs, **how)
        parts = (model, vars(model).get("config"), [(name, one.shape) for name, one in model.named_parameters()])
        key = repr((parts, sorted(layers), sorted(mixing.items()), inputs.shape, inputs.dtype, how))
        if key not in _known:
            _known[key] = find_leaks(model, layers, mixing, inputs, **how)
        return dict(_known[key])

    monkeypatch.setattr(select, "find_leaks", remembered)


@pytest.fixture(scope="session")
def _few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    few_images(folder / "few", load_images("digits"), train=80, test=70)
    return folder


@pytest.fixture(scope="module")
def among_few(_few: Path) -> Iterator[None]:
    """`--data few` is of 70 digits to test on: most of the time of a command would go to tests on all 599."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(_few)
        yield
