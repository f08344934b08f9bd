"""`save_model` and `load_model`: a converted model in a folder, without transformers, in the files that transformers has.

`config.json` with the record under "quantization_config", and `model.safetensors`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from strassen_tile import files
from strassen_tile.convert.record import Kind, Record, follow
from strassen_tile.convert.swap import Conversion, changed
from strassen_tile.errors import CheckpointError, ConversionError
from strassen_tile.nn.config import Mixing, Scope
from strassen_tile.nn.token_mix import TokenMixKind

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_KEY = "quantization_config"
_MAX_JSON = 1 << 26


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write a converted model into `folder`: its tensors, and which layers are STL layers.

    `load_model` puts them into a freshly built dense model of the same class. Models of transformers have `save_pretrained`.

    Args:
        model: with STL layers; what it has besides is saved as `state_dict()` has it.
        folder: made if it is missing. Of files in it only those two are replaced, and of `config.json` only what is ours.

    Raises:
        ConversionError: there are no STL layers, or the state dict holds other things than tensors.
        CheckpointError: `folder` holds a model in several files, or a `config.json` that is none.
        OSError: it cannot be written; what was there before is still there.
    """
    from safetensors.torch import save  # when it is wanted: the operator needs torch alone

    folder = files.as_path(folder)
    if (record := Record.of(model)) is None:
        raise ConversionError(f"{type(model).__name__} has no STL layers; torch and safetensors save it as it is")
    if (folder / INDEX).exists():
        raise CheckpointError(
            f"{folder} holds a model in several files ({INDEX}), which would be mixed up; take another folder"
        )
    config = _read_config(folder) if (folder / CONFIG).exists() else {}
    tensors = save(_distinct(model), metadata={"format": "pt"})
    with files.written_first(folder / TENSORS, tensors):  # should we be killed in between, the two are seen not to fit
        files.write_text(folder / CONFIG, json.dumps({**config, _KEY: record.to_dict()}, indent=2) + "\n")


def load_model(model: nn.Module, folder: str | Path) -> Conversion:
    """Put the STL layers that `save_model`, or `save_pretrained`, wrote into `model`, and all tensors with them.

    Args:
        model: freshly built as the saved one was before its conversion. It keeps its device, dtype and mode.
        folder: that was saved into.

    Returns:
        A `Conversion`: what is converted, why other layers are not, and the padding mask. It cannot be undone.

    Raises:
        CheckpointError: files are missing, truncated or of a newer version, or do not fit each other or the model. It is
            then as it was.
    """
    folder = files.as_path(folder)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise CheckpointError(
            "the model is on the meta device; build it where it is to be (buffers are not all in the file)"
        )
    if (known := _read_config(folder).get(_KEY)) is None:
        raise CheckpointError(f"{folder / CONFIG} has no {_KEY}: there is no converted model in it")
    record = Record.from_dict(known)
    paths = _tensor_files(folder)
    check_files(record, record.layers, paths)
    with torch.inference_mode(False):  # it is to be trained, wherever it is made
        conversion = record.put_into(model)
    try:
        state = model.state_dict(keep_vars=True)
        with _opened(paths) as found:
            _check_names(
                model, {n: tuple(t.shape) for n, t in state.items()}, {n: _shape(f, n) for n, f in found.items()}, state
            )
            tensors = {name: file.get_tensor(name) for name, file in found.items()}
    except BaseException:
        for action in conversion._undo:
            action()
        raise
    model.load_state_dict(tensors, strict=False)  # names and shapes were compared: what is missing shares a tensor
    follow(model, conversion)
    changed(model, conversion.skipped)
    return conversion


def check_files(record: Record, placed: Collection[str], paths: Iterable[str | Path]) -> None:
    """Whether the layers in the safetensors files are those of the record, by their kinds and number; names may differ.

    Args:
        record: that came with them.
        placed: the names in it that the model to be loaded has a place for. It may lack a head that the files have, and the
            files one that the record has (a part of a model was saved, under the config of the whole).
        paths: of the files; others than safetensors are not looked into.

    Raises:
        CheckpointError: they are not, or a file is truncated or damaged.
    """
    paths = [path for path in paths if Path(path).suffix == ".safetensors"]
    if not paths:
        return
    with _opened(paths) as found:
        meanings = {n.removesuffix(".meaning"): _shape(f, n) for n, f in found.items() if n.endswith(".meaning")}
        there: Counter[str] = Counter()
        for name, shape in meanings.items():
            if len(shape) in (8, 9) and shape[0] == 0 and f"{name}.encoder" in found:
                layer = "STLLinearFP8" if f"{name}.encoder_scale" in found else "STLLinear"
                rank = _shape(found[f"{name}.encoder"], f"{name}.encoder")[-3]
                mixing, scope = get_args(Mixing)[shape[1]], get_args(Scope)[shape[2]]
                token_mix = get_args(TokenMixKind)[(*shape, 0)[8]]
                there[_described(layer, rank, shape[3:6], mixing, scope, token_mix)] += 1
    said, least = (
        Counter(_of_kind(kind) for kind in kinds)
        for kinds in (record.layers.values(), (record.layers[name] for name in placed))
    )
    if not (least <= there and (record.part or there <= said)):
        raise CheckpointError(
            f"config.json and the tensors disagree: the one says {_counted(said)}, the others are {_counted(there)}. Nothing "
            "was loaded; save the model again, both in one go"
        )


def stl_layers_in(paths: Iterable[str | Path]) -> set[str]:
    """The names of the STL layers whose tensors are in these safetensors files."""
    with _opened([path for path in paths if Path(path).suffix == ".safetensors"]) as found:
        return {name.removesuffix(".meaning") for name in found if name.endswith(".meaning")}


def _of_kind(kind: Kind) -> str:
    config = kind.config
    mixing = config.mixing if config.mixes_in_tiles else "none"
    return _described(kind.layer, config.rank, config.pqs, mixing, config.encoder_scope, config.token_mix)


def _described(layer: str, rank: int, tile: Iterable[int], mixing: str, scope: str, token_mix: str) -> str:
    ahead = "" if token_mix == "none" else f", token_mix={token_mix!r}"
    return f"{layer} of rank {rank} and tile {tuple(tile)}, mixing={mixing!r}, encoder_scope={scope!r}{ahead}"


def _counted(kinds: Mapping[str, int]) -> str:
    return "; ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "no STL layers"


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with one name for tensors that are one, as safetensors wants it."""
    kept: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            what = "on the meta device (offloaded?)" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise ConversionError(f"{name} is {what}; safetensors files hold tensors with their numbers")
        kept.setdefault(id(tensor), name)
    return {name: _alone(state[name].detach()) for name in kept.values()}


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, and sharing its storage with nothing: safetensors refuses views of one tensor."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _check_names(
    model: nn.Module,
    wanted: Mapping[str, tuple[int, ...]],
    there: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Any],
) -> None:
    present = {id(state[name]) for name in there if name in state}
    missing = [name for name in wanted if name not in there and id(state[name]) not in present]
    unknown = [name for name in there if name not in wanted]
    other = [f"{n} {there[n]} for {wanted[n]}" for n in there if n in wanted and there[n] != wanted[n]]
    said = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown here", unknown), ("of another shape", other))
        if names
    ]
    if said:
        raise CheckpointError(
            f"the tensors are not those of this {type(model).__name__}: {'; '.join(said)}. Nothing was changed. (Of some "
            "models of transformers the names in files are others: those come back by from_pretrained)"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = files.read_json(path, _MAX_JSON)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no object")
    return config


def _tensor_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        if not (folder / TENSORS).exists():
            raise CheckpointError(f"{folder} has no {TENSORS}")
        return [folder / TENSORS]
    try:
        index = files.read_json(folder / INDEX, _MAX_JSON)
        names = sorted(set(index["weight_map"].values()))  # type: ignore[index]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read {folder / INDEX}: {error}") from error
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{folder / INDEX} names a file elsewhere: {strange[0]!r}")
    if absent := [name for name in names if not (folder / name).exists()]:
        raise CheckpointError(f"{folder} has no {', '.join(absent)}, which {INDEX} names")
    return [folder / name for name in names]


@contextmanager
def _opened(paths: Iterable[str | Path]) -> Iterator[dict[str, Any]]:
    """Name of a tensor → the open file that has it."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Any] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated, damaged or no safetensors file: {error}") from error
        found |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]
    yield found


def _shape(file: Any, name: str) -> tuple[int, ...]:
    return tuple(file.get_slice(name).get_shape())
