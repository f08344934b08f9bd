"""Input places: parts of the example inputs that are changed, one at a time, to see what depends on them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strassen_tile.convert.running import mapped

# Arguments that say how the others are to be read. They are left as the caller gives them.
_READING = ("mask", "position", "cache")
_ALONG_SEQUENCE, _ALONG_OTHERS = 8, 4  # places along the second dimension, and along later ones


@dataclass(frozen=True)
class Place:
    """A part of one input tensor: a whole sample, one position of one sample, a line of an image …

    Attributes:
        leaf: which of the input tensors, counted as `leaves` does.
        name: of that input, for messages.
        dim: the dimension it is one index of.
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


def leaves(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nest in order, each with the name its message uses."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from leaves(item, f"{name}.{at}" if name else str(at))


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


def places(model: nn.Module, example_inputs: object, *, effort: int = 1, padded: bool = False) -> list[Place]:
    """Where to change the inputs: samples along the first dimension, places along every other one.

    Args:
        model: its arguments' names tell masks and positions, which are not changed.
        example_inputs: of the model.
        effort: how many more places than usual.
        padded: whether places that the inputs' own mask calls padding count too.
    """
    arguments = list(leaves(named(model, example_inputs)))
    usable = [at for at, (name, t) in enumerate(arguments) if _can_change(t) and not _reads(name)]
    chosen = [at for at in usable if arguments[at][1].dtype != torch.bool] or usable
    found = [place for leaf in chosen for place in _places(leaf, *arguments[leaf], effort)]
    masks = [] if padded else real_rows(model, example_inputs)
    shapes = {leaf: arguments[leaf][1].shape[:2] for leaf in chosen}
    return [place for place in found if _counts(place, [m for m in masks if m.shape == shapes[place.leaf]])]


def change(example_inputs: object, place: Place, seed: int) -> object:
    """The inputs with that place altered: floats by noise of the tensor's own scale, integers to others that occur."""
    tensors = [t for _, t in leaves(example_inputs)]
    before = tensors[place.leaf]
    after = before.detach().clone()
    after[place.selection] = _other(before, seed)[place.selection]
    tensors[place.leaf] = after
    return with_leaves(example_inputs, tensors)


def repeated(example_inputs: object, samples: int) -> object | None:
    """The inputs with their samples repeated to at least that many; None if they have no common first dimension."""
    sized = [t for _, t in leaves(example_inputs) if t.ndim]
    if not sized or not sized[0].shape[0]:
        return None
    batch = sized[0].shape[0]
    times = -(-samples // batch)
    return mapped(
        example_inputs,
        lambda t: torch.cat([t] * times) if t.ndim and t.shape[0] == batch else t,
        lambda other: other,
    )


def _can_change(tensor: Tensor) -> bool:
    return tensor.ndim > 0 and tensor.numel() > 0 and tensor.layout == torch.strided and not tensor.is_nested


def _reads(name: str) -> bool:
    return any(word in name.lower() for word in _READING)


def _places(leaf: int, name: str, tensor: Tensor, effort: int) -> Iterator[Place]:
    everything: list[int | None] = [None] * tensor.ndim
    batch = tensor.shape[0]
    for sample in _spread(batch, 3 * effort):
        yield Place(leaf, name, 0, (sample, *everything[1:]))
    for dim in range(1, tensor.ndim):
        size = tensor.shape[dim]
        if size < 2:
            continue
        for at in _spread(size, (_ALONG_SEQUENCE if dim == 1 else _ALONG_OTHERS) * effort):
            yield Place(leaf, name, dim, (0, *everything[1:dim], at, *everything[dim + 1 :]))
        if batch > 1:
            yield Place(leaf, name, dim, (batch - 1, *everything[1:dim], size // 2, *everything[dim + 1 :]))


def _spread(size: int, most: int) -> list[int]:
    """At most that many of range(size): neighbours at the start, in the middle and at the end, where tiles begin and end."""
    middle = size // 2
    wanted = [0, size - 1, middle, 1, size - 2, middle + 1, 2, middle - 1, size - 3, 3, size // 4, 3 * size // 4]
    step = max(1, size // (most + 1))
    wanted += list(range(0, size, step)) if most > len(wanted) else []
    kept = list(dict.fromkeys(at for at in wanted if 0 <= at < size))[:most]
    return sorted(kept) if size > most else list(range(size))


def _other(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_complex():
        return torch.view_as_complex(_other(torch.view_as_real(tensor.resolve_conj()), seed).contiguous())
    if tensor.is_floating_point():
        finite = tensor[tensor.isfinite()].double()
        scale = float(finite.std()) if finite.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        strength = (scale or 1.0) * (1.0, 5.0, 0.3)[
            seed % 3
        ]  # what a maximum or a gate hides from one it shows to another
        return (tensor + (noise * strength).to(tensor)).to(tensor.dtype)
    values = tensor.unique()
    if len(values) == 1:  # one less is as valid as any, and zero has only its successor
        return tensor - 1 if values[0] > 0 else tensor + 1
    by = 1 + seed % (len(values) - 1)
    others: Tensor = values[(torch.searchsorted(values, tensor.contiguous()) + by) % len(values)]
    return others


def real_rows(model: nn.Module, example_inputs: object) -> list[Tensor]:
    """The masks (B, N) among the inputs that say which rows are no padding, True there."""
    return [real for name, t in leaves(named(model, example_inputs)) if (real := _as_real(name, t)) is not None]


def _as_real(name: str, mask: Tensor) -> Tensor | None:
    if mask.ndim != 2 or not name.endswith(("attention_mask", "key_padding_mask")):
        return None
    if name.endswith("key_padding_mask"):  # PyTorch's: True, or −∞, for padding
        return ~mask if mask.dtype == torch.bool else mask == 0
    return mask != 0


def _counts(place: Place, masks: list[Tensor]) -> bool:
    """Whether no mask of its input's shape calls the place padding."""
    sample, position = (*place.index, None)[:2]
    if place.dim != 1 or sample is None or position is None:
        return True
    return all(bool(real[sample, position]) for real in masks)
