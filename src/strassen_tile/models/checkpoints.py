"""Weights from files: safetensors, or torch files read without running any code in them.

Requires torch; safetensors only when a .safetensors file is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from strassen_tile.errors import ConfigError, DataError, shape_text
from strassen_tile.files import as_path
from strassen_tile.nn.base import TileLayer

WRAPPERS = ("state_dict_ema", "state_dict")  # the averaged weights, where a file has both, are the evaluated ones
PREFIX = "module."  # left by DistributedDataParallel
NAMED = 8  # keys named in an error before "and N more"


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, may_differ: Sequence[str] = ()
) -> tuple[str, ...]:
    """Load weights into `model` in place: all of them, or none and an error.

    Reads `.safetensors`, and any other suffix as a torch file with `weights_only=True`. A top-level "state_dict_ema" or
    "state_dict" is entered and a leading "module." taken off the names, as the published T2T-ViT files need. Nothing is
    resized: a checkpoint of other sizes is refused, and so is one whose numbers the model cannot hold (complex for real,
    fractions for whole, finite ones that would be infinite) or that lacks them (sparse, quantised or meta tensors). Until all
    of it is in, a copy of what the model held is kept in CPU memory.

    Args:
        model: what to load into.
        path: the file.
        may_differ: beginnings of the names of tensors that may have another shape in the file, such as "head." where
            there are other classes; the model then keeps its own.

    Returns:
        The names of the tensors that the model kept.

    Raises:
        DataError: the file is missing or unreadable, or does not fit the model; both sides are named. The model is as it was.
        ConfigError: the model is on the meta device, or lazy, and has no storage to load into.
        ImportError: a .safetensors file, and safetensors is not installed.
    """
    path = as_path(path)
    state = _state_dict(_read(path), path)
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    if any(is_lazy(value) or value.is_meta for value in expected.values()):
        raise ConfigError(
            f"load_checkpoint({str(path)!r}): the model has no storage yet; call to_empty() first if it is on the meta "
            "device, or run it once if it is lazy."
        )
    strange = {key: kind for key, value in state.items() if (kind := _kind(value))}
    pairs = {key: (expected[key], state[key]) for key in (expected.keys() & state.keys()) - strange.keys()}
    kept = sorted(k for k, (a, b) in pairs.items() if a.shape != b.shape and k.startswith(tuple(may_differ)))
    state |= {key: pairs.pop(key)[0] for key in kept}
    layers = model.named_modules(remove_duplicate=False)
    unsaid = {f"{name}.meaning".lstrip(".") for name, layer in layers if isinstance(layer, TileLayer)}  # by older files
    problems = [
        *_list("missing", expected.keys() - state.keys() - unsaid),
        *_list("unexpected", state.keys() - expected.keys()),
        *_list("without plain numbers", (f"{key}: {kind}" for key, kind in strange.items())),
        *_list(
            "of another shape",
            (
                f"{key}: expected {shape_text(ours.shape)}, got {shape_text(theirs.shape)}"
                for key, (ours, theirs) in pairs.items()
                if ours.shape != theirs.shape
            ),
        ),
        *_list(
            "of another kind of number",
            (
                f"{key}: expected {ours.dtype}, got {theirs.dtype}"
                for key, (ours, theirs) in pairs.items()
                if not torch.can_cast(theirs.dtype, ours.dtype)
            ),
        ),
        *_list(
            "with numbers too large",
            (
                f"{key}: for {ours.dtype}, in {theirs.dtype}"
                for key, (ours, theirs) in pairs.items()
                if torch.can_cast(theirs.dtype, ours.dtype) and _overflows(theirs, ours.dtype)
            ),
        ),
    ]
    if problems:
        raise DataError(f"{path} does not fit the model; keys {'; '.join(problems)}.")
    before = {key: value.to("cpu", copy=True) for key, value in expected.items()}
    try:
        model.load_state_dict(state)
    except BaseException as error:  # an interrupt too
        with torch.no_grad():
            for key, value in expected.items():
                with suppress(RuntimeError):  # what cannot be written was not
                    value.copy_(before[key])
        if not isinstance(error, Exception):
            raise
        raise DataError(f"{path} cannot be loaded, and the model is as it was: {error}") from error
    return tuple(kept)


def _read(path: Path) -> object:
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL (on some versions)
        raise DataError(f"{str(path)!r} cannot be looked up: {getattr(error, 'strerror', None) or error}") from error
    if not there:
        raise DataError(f"{str(path)!r}: no such checkpoint file.")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {path} needs safetensors: pip install safetensors") from error
        try:
            return load_file(path)
        except SafetensorError as error:
            raise DataError(f"{path} is not a safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: torch's unpickler raises what it trips over, down to KeyError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{path} cannot be read as tensors alone ({reason}). A file that holds other objects has to be saved again "
            "as a plain state dict by whoever trusts it."
        ) from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DataError(f"{path} holds no state dict: expected names with tensors, at the top or under {WRAPPERS}.")
    state = {str(key).removeprefix(PREFIX): value for key, value in content.items()}
    if len(state) != len(content):
        raise DataError(
            f"{path} names some tensors twice, with and without {PREFIX!r}; which are meant, it does not say."
        )
    return state


def _kind(value: Tensor) -> str | None:
    """What a tensor is that has not one number in memory for each entry; None if it has."""
    if value.is_meta:
        return "on the meta device"
    if value.is_nested or value.layout != torch.strided:
        return "nested" if value.is_nested else str(value.layout)
    return "quantised" if value.is_quantized else None


def _overflows(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a finite number is beyond `dtype`: infinite in it, or, of whole ones, another."""
    if values.dtype == dtype:
        return False
    if not (dtype.is_floating_point or dtype.is_complex):
        return not torch.equal(values.to(dtype).to(values.dtype), values)
    wide = torch.view_as_real(values) if values.is_complex() else values
    wide = wide.double()  # comparisons of whole numbers, and of floats of one byte, are rounded or lacking
    return bool((wide.isfinite() & (wide.abs() > torch.finfo(dtype).max)).any())


def _list(what: str, keys: Iterable[str]) -> list[str]:
    """["what (n): a, b, …"], or [] when there is nothing to say."""
    names = sorted(keys)
    if not names:
        return []
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"{what} ({len(names)}): {', '.join(names[:NAMED])}{more}"]
