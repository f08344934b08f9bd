"""What a call says of its rows, read from all its arguments: masks of rows, of who sees whom, and borders of documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from strassen_tile.errors import ShapeError, shape_text
from strassen_tile.nn.calls import Call
from strassen_tile.nn.masks import (
    OTHERS,
    PATTERNS,
    ROWS,
    SIGNALS,
    Takes,
    check_hides_nothing,
    check_one_sequence,
    check_past,
    check_pattern,
    documents_of,
    mask_of_layers,
    numbered,
    real_rows,
    rows_of_pattern,
)


def said(
    module_name: str,
    takes: Takes,
    given: Mapping[str, Any],
    outer: Call | None,
    held: Tensor | None,
    past: int,
    *,
    tiles: bool,
    ahead: bool,
) -> tuple[Tensor | None, str]:
    """The real rows of a call, or the documents that they are of (as `Call.real`), and why that is not clear.

    Args:
        module_name: of what is called.
        takes: what it takes.
        given: its arguments, by name.
        outer: the call around it.
        held: what a `with` around it says.
        past: rows that a cache holds.
        tiles, ahead: of the `PaddingMask`.

    Raises:
        ShapeError: the arguments do not say it, or what they say cannot be followed.
    """
    check_past(module_name, given)
    if not (tiles or ahead) and isinstance(given.get("attention_mask"), Mapping):
        given = {**given, "attention_mask": mask_of_layers(given["attention_mask"])}
    if not (tiles or ahead) and (real := rows_of_pattern(given.get("attention_mask"), past)) is not None:
        return real, ""
    real, unclear = _masked(module_name, takes, given, outer, held, anywhere=not tiles)
    known = held if real is None else real
    if tiles:
        check_one_sequence(given, known)
    elif not unclear and (documents := documents_of(given)) is not None:
        real = numbered(documents, known)
    return real, unclear


def _masked(
    module_name: str,
    takes: Takes,
    given: Mapping[str, Any],
    outer: Call | None,
    held: Tensor | None,
    *,
    anywhere: bool,
) -> tuple[Tensor | None, str]:
    """The real rows as the arguments of a call say them, and why that is not clear."""
    first = [name for name in ROWS if given.get(name) is not None]
    second = [name for name in OTHERS if given.get(name) is not None]
    takes_first = any(name in takes.positions for name in ROWS)
    if any(name in takes.positions for name in OTHERS):
        if takes_first:
            return None, "it has masks for two sequences" if first or second else ""
        first = second
    if not first:
        told = outer is not None and (outer.real is not None or bool(outer.unclear))
        hidden = any(given.get(name) is not None for name in PATTERNS if name in takes.positions)
        if not told or (takes.own_rows and not hidden):
            return None, ""
        return None, f"{module_name} takes a mask and was given none, inside a call with one"
    name, mask = first[0], given[first[0]]
    if isinstance(mask, Tensor) and (mask.ndim == 2 or name != "attention_mask"):
        return real_rows(mask, name, anywhere=anywhere), ""
    real = outer.real if outer is not None and outer.real is not None else held
    of_tower = outer is not None and getattr(outer.module, "main_input_name", "") in SIGNALS
    if real is None and outer is not None and of_tower and isinstance(mask, Tensor):
        check_hides_nothing(mask)  # the tower was told of no padding under a name that is followed
        return None, outer.unclear
    if real is None and (outer is None or not outer.unclear):
        shape = shape_text(mask.shape) if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
        raise ShapeError(
            f"attention_mask {shape} does not say which rows are padding: pass one of shape (B, N), or "
            "call the model inside `with strassen_tile.padding(model, mask)`"
        )
    if isinstance(mask, Tensor):
        check_pattern(mask, real)
    return (None, outer.unclear) if outer is not None and outer.unclear else (None if real is held else real, "")
