"""The example inputs: batches of them to run, and the places in them that are changed, one at a time."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strassen_tile.convert.running import leaves, mapped, run

# "memory_key_padding_mask" is of rows that are not the layer's.
_PADDING = re.compile(r"(?:^|_)(?:lengths?|pixel_mask|pixel_attention_mask|(?<!key_)padding_mask)$")

# How many places along the first, the second, and later dimensions, and how many single points.
_SAMPLES, _ALONG_SEQUENCE, _ALONG_OTHERS, _POINTS = 4, 16, 4, 4
# Of a model with few parameters, every position of the first sample up to so many.
_ALL, _SMALL = 64, 5_000_000
_MANY, _MOST_NUMBERS = (
    24,
    2**18,
)  # samples of the enlarged batch (half as many if it is larger): a multiple of small groups


@dataclass(frozen=True)
class Place:
    """A part of one input tensor: a whole sample, one position of one sample, a line of an image …

    Attributes:
        leaf: which of the input tensors, counted as `leaves` does.
        name: of that input, for messages.
        dim: the dimension it is one index of; that of a point is the number of dimensions.
        index: of the part; None stands for a whole dimension.
    """

    leaf: int
    name: str
    dim: int
    index: tuple[int | None, ...]

    def __str__(self) -> str:
        shown = list(self.index)
        while shown and shown[-1] is None:
            shown.pop()
        return f"{self.name}[{', '.join(':' if i is None else str(i) for i in shown)}]"

    @property
    def selection(self) -> tuple[int | slice, ...]:
        """The index as tensors take it."""
        return tuple(slice(None) if i is None else i for i in self.index)


def named(model: nn.Module, example_inputs: object) -> dict[str, object]:
    """The inputs by the names of the model's arguments, where those can be told."""
    if isinstance(example_inputs, Mapping):
        return {str(key): value for key, value in example_inputs.items()}
    positional = list(example_inputs) if isinstance(example_inputs, list | tuple) else [example_inputs]
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    names += [f"input {at}" for at in range(len(names), len(positional))]
    return dict(zip(names, positional, strict=False))


def with_leaves(example_inputs: object, tensors: list[Tensor]) -> object:
    """The same nest with `tensors` as its leaves."""
    left = iter(tensors)
    return mapped(example_inputs, lambda _: next(left), lambda other: other)


def places(model: nn.Module, example_inputs: object, *, effort: int = 1) -> list[Place]:
    """Where to change the inputs: samples along the first dimension, places along every other one, and single points.

    Args:
        model: its arguments' names tell masks, which are not changed.
        example_inputs: of the model.
        effort: how many times as many places as usual.
    """
    arguments = list(leaves(named(model, example_inputs)))
    usable = [at for at, (name, t) in enumerate(arguments) if _can_change(t) and not is_mask(name, t)]
    small = sum(p.numel() for p in model.parameters()) < _SMALL
    first = max(_ALONG_SEQUENCE, _ALL if small else 0) * effort
    return [place for leaf in usable for place in _places(leaf, *arguments[leaf], effort, first)]


def is_mask(name: str, tensor: Tensor) -> bool:
    """Whether an argument says how the others are to be read: called a mask, and of two values (or scores up to −∞)."""
    if "mask" not in name.lower():
        return False
    if tensor.dtype == torch.bool:
        return True
    return bool(((tensor == 0) | (tensor == 1) | (tensor < -1e3)).all())


def in_padding(model: nn.Module, example_inputs: object, place: Place) -> bool:
    """Whether a mask among the inputs calls the place padding: then its rows are to be zeroed before they reach others."""
    arguments = list(leaves(named(model, example_inputs)))
    shape = arguments[place.leaf][1].shape[:2]
    sample, position = (*place.index, None)[:2]
    if sample is None or position is None:
        return False
    masks = [real for real in real_rows(model, example_inputs) if real.shape == shape]
    return any(not bool(real[sample, position]) for real in masks)


def repeated(example_inputs: object, samples: int, dim: int = 0) -> object | None:
    """The inputs with their samples, along `dim`, repeated to at least that many; None if they have no common size there."""
    sized = [t for _, t in leaves(example_inputs) if t.ndim > dim]
    if not sized or not sized[0].shape[dim]:
        return None
    batch = sized[0].shape[dim]
    times = -(-samples // batch)
    return mapped(
        example_inputs,
        lambda t: torch.cat([t] * times, dim=dim) if t.ndim > dim and t.shape[dim] == batch else t,
        lambda other: other,
    )


def batches(model: nn.Module, example_inputs: object) -> list[tuple[object, bool]]:
    """The inputs to try, and whether only samples matter: as given (one sample twice), and many samples."""
    sized = [t for _, t in leaves(example_inputs) if t.ndim]
    given = example_inputs
    if sized and all(t.shape[0] == 1 for t in sized if t.ndim >= min(2, max(u.ndim for u in sized))):
        doubled = _runs(model, repeated(example_inputs, 2))
        given = example_inputs if doubled is None else doubled
    found = [(given, False)]
    numbers = sum(t.numel() / max(1, t.shape[0]) for t in sized)
    for many in (
        repeated(example_inputs, _MANY if numbers * _MANY <= _MOST_NUMBERS else _MANY // 2),
        repeated(example_inputs, 2, dim=1) if any(t.ndim > 2 and t.shape[1] == 1 for t in sized) else None,
    ):
        if _runs(model, many) is not None:
            found.append((many, True))
    return found


def _runs(model: nn.Module, inputs: object) -> object | None:
    try:
        if inputs is not None:
            run(model, inputs)
    except Exception:  # a model may refuse other batch sizes in any way; then there are no such batches
        return None
    return inputs


def _can_change(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and tensor.numel() > 0 and tensor.layout == torch.strided and not tensor.is_nested


def _places(leaf: int, name: str, tensor: Tensor, effort: int, first: int) -> Iterator[Place]:
    everything: list[int | None] = [None] * tensor.ndim
    batch, found = tensor.shape[0], dict[Place, None]()
    samples = _spread(batch, _SAMPLES * effort)
    for sample in samples:
        found[Place(leaf, name, 0, (sample, *everything[1:]))] = None
    wide = [dim for dim in range(1, tensor.ndim) if tensor.shape[dim] > 1]
    for dim in wide:
        for sample in samples:  # each by itself: what one sees, another may not
            most = _ALONG_OTHERS * effort if dim > 1 else _ALONG_SEQUENCE * effort if sample else first
            for at in _spread(tensor.shape[dim], most):
                found[Place(leaf, name, dim, (sample, *everything[1:dim], at, *everything[dim + 1 :]))] = None
    generator = torch.Generator(device="cpu").manual_seed(0)
    for count in range(_POINTS * effort if len(wide) > 1 else 0):  # where lines cross, not a whole line
        point = [int(torch.randint(size, (), generator=generator, device="cpu")) for size in tensor.shape]
        parts = wide if count % 3 == 0 else wide[:-1] if count % 3 == 1 else wide[1:]
        index = [point[dim] if dim in parts else None for dim in range(tensor.ndim)]
        found[Place(leaf, name, tensor.ndim, (samples[count % len(samples)], *index[1:]))] = None
    yield from found


def _spread(size: int, most: int) -> list[int]:
    """At most that many of range(size): neighbours at the start, in the middle and at the end, where tiles begin and end."""
    middle = size // 2
    wanted = [0, size - 1, middle, 1, size - 2, middle + 1, 2, middle - 1, size - 3, 3, size // 4, 3 * size // 4]
    step = max(1, size // (most + 1))
    wanted += list(range(0, size, step)) if most > len(wanted) else []
    kept = list(dict.fromkeys(at for at in wanted if 0 <= at < size))[:most]
    return sorted(kept) if size > most else list(range(size))


def real_rows(model: nn.Module, example_inputs: object) -> list[Tensor]:
    """The masks (B, N) among the inputs that say which rows are no padding, True there."""
    return [real for name, t in leaves(named(model, example_inputs)) if (real := _as_real(name, t)) is not None]


def unfollowed(model: nn.Module, example_inputs: object) -> str | None:
    """The name of an argument that says which rows are padding, by all appearances, but is none that a `PaddingMask` reads."""
    names = (name for name, _ in leaves(named(model, example_inputs)))
    return next((name for name in names if _PADDING.search(name)), None)


def _as_real(name: str, mask: Tensor) -> Tensor | None:
    if mask.ndim != 2 or not name.endswith(("attention_mask", "key_padding_mask")):
        return None
    if name.endswith("key_padding_mask"):  # PyTorch's: True, or −∞, for padding
        return ~mask if mask.dtype == torch.bool else mask == 0
    return mask != 0
