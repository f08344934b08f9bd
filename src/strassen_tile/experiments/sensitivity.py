"""Which blocks of a pretrained model are converted, and at which rank: those that suffer least for the FLOPs they save."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from strassen_tile.baselines.model_cost import model_cost
from strassen_tile.convert import Conversion, replace_modules
from strassen_tile.errors import ConfigError
from strassen_tile.experiments.material import Material

_BLOCK = re.compile(r"(?:^|.*?\.)\d+\.")
_Layers = Mapping[str, nn.Module]


def block_of(name: str) -> str | None:
    """The beginning of a layer's name that is its numbered block's, "model.layers.0."; None outside them."""
    match = _BLOCK.match(name)
    return None if match is None else match[0]


def cheapest_for(
    model: nn.Module, ways: Sequence[Callable[[], Conversion]], found: Material, fewer: float, batch_size: int
) -> Conversion:
    """Convert the blocks that cost least for what they save, each in the way that does, until so many FLOPs are saved.

    Each block is converted alone in each way, and the loss of the validation text taken. Step by step the block then takes
    the way that raises it least for every FLOP that it saves more than what it has, until the whole model has `fewer` times
    fewer FLOPs. What later steps have made needless is taken back.

    Args:
        model: dense; changed in place.
        ways: convert it, each at a rank of its own.
        found: the dense model, and the task that measures.
        fewer: FLOPs of the dense model as a multiple of those that are to be left.
        batch_size: at which losses are taken.

    Returns:
        What is then converted.

    Raises:
        ConversionError: there is nothing to convert.
        ConfigError: with every block converted in its cheapest way there are more FLOPs left.
    """
    converted: list[Conversion] = []
    options: dict[str, list[tuple[int, _Layers]]] = {}  # of a block: FLOPs saved, and the layers that save them
    for way in ways:
        conversion = way()
        cost = model_cost(model, conversion, found.unit)
        for block, layers in _by_block(conversion.converted).items():
            options.setdefault(block, []).append((sum(cost.saved[name] for name in layers), layers))
        replace_modules(model, {name: copy.deepcopy(found.model.get_submodule(name)) for name in conversion.converted})
        converted.append(conversion)
    check_reach(fewer, cost.dense_flops, sum(max(saved for saved, _ in ways_of) for ways_of in options.values()))
    rises = _rises(model, options, found, batch_size)
    taken = _taken(rises, options, cost.dense_flops - cost.dense_flops / fewer)
    kept = {name: layer for block, at in taken.items() for name, layer in options[block][at][1].items()}
    replace_modules(model, kept)
    first = converted[0]
    skipped = {name: why for name, why in first.skipped.items() if name not in kept}
    for block in options.keys() - taken.keys():
        why = f"left dense: its block alone costs {min(rises[block]):.3g} of the loss"
        skipped |= dict.fromkeys(options[block][0][1], why)
    return Conversion(kept, skipped, first.calls, first.padding)


def check_reach(fewer: float, dense_flops: int, most: int) -> None:
    """Raise ConfigError where `most` of a model's FLOPs saved do not make them `fewer` times fewer."""
    if dense_flops < fewer * (dense_flops - most):
        raise ConfigError(
            f"fewer={fewer:g}: with every block converted the model has {dense_flops / (dense_flops - most):.2f}× fewer FLOPs; "
            "take a smaller rank or ratio, or a smaller fewer"
        )


def _by_block(layers: _Layers) -> dict[str, dict[str, nn.Module]]:
    found: dict[str, dict[str, nn.Module]] = {}
    for name, layer in layers.items():
        found.setdefault(block_of(name) or "", {})[name] = layer
    return found


def _rises(
    model: nn.Module, options: Mapping[str, list[tuple[int, _Layers]]], found: Material, batch_size: int
) -> dict[str, list[float]]:
    """By what the loss rises with each block converted alone, in each of its ways."""
    least = _loss(model, found, batch_size)
    rises: dict[str, list[float]] = {}
    for block, ways in options.items():
        for _, layers in ways:
            dense = {name: model.get_submodule(name) for name in layers}
            replace_modules(model, layers)
            rises.setdefault(block, []).append(_loss(model, found, batch_size) - least)
            replace_modules(model, dense)
    return rises


def _taken(
    rises: Mapping[str, Sequence[float]], options: Mapping[str, list[tuple[int, _Layers]]], wanted: float
) -> dict[str, int]:
    """The way that each converted block takes, for `wanted` FLOPs saved in all."""
    taken: dict[str, int] = {}
    saved = 0
    while saved < wanted:
        best = None
        for block, ways in options.items():
            now = taken.get(block)
            rise, at = (0.0, 0) if now is None else (rises[block][now], ways[now][0])
            for index, (flops, _) in enumerate(ways):
                if flops > at:
                    price = (rises[block][index] - rise) / (flops - at)
                    if best is None or price < best[0]:
                        best = price, block, index, flops - at
        assert best is not None  # what all save together is enough
        _, block, index, more = best
        taken[block] = index
        saved += more
    return _spared(taken, rises, options, saved - wanted)


def _spared(
    taken: dict[str, int],
    rises: Mapping[str, Sequence[float]],
    options: Mapping[str, list[tuple[int, _Layers]]],
    spare: float,
) -> dict[str, int]:
    """What is taken less what more is saved by than is wanted: of steps back that leave enough, always the one worth most."""
    while True:
        best: tuple[float, str, int | None, int] = 0.0, "", None, 0
        for block, now in taken.items():
            for index in (None, *range(len(options[block]))):
                rise, flops = (0.0, 0) if index is None else (rises[block][index], options[block][index][0])
                less, worth = options[block][now][0] - flops, rises[block][now] - rise
                if 0 < less <= spare and worth > best[0]:
                    best = worth, block, index, less
        _, block, index, less = best
        if not block:
            return taken
        spare -= less
        if index is None:
            del taken[block]
        else:
            taken[block] = index


def _loss(model: nn.Module, found: Material, batch_size: int) -> float:
    from strassen_tile.integrations.fitting import measure  # late: transformers takes seconds

    return float(str(measure(model, found.task(0), batch_size, "", validation=True)["loss"]))
