"""Dataclass fields that users set: as command-line options, as `key=value`, and in TOML files, all read in one way.

A field's type and metadata say everything: "help" is its text; "parse", where the type does not say how, makes a value of
text. TOML values go through the same text, so that a file cannot hold what an option would refuse.
"""

from __future__ import annotations

import re
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from strassen_tile.errors import ConfigError, ShapeError
from strassen_tile.files import opened
from strassen_tile.tiling import Tile, as_tile

_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Setting:
    """One field: its name, what it says of itself, how text becomes its value, and its default (or `dataclasses.MISSING`)."""

    name: str
    help: str
    parse: Callable[[str], Any]
    default: Any
    choices: tuple[str, ...]
    is_switch: bool


def settings_of(record: type) -> dict[str, Setting]:
    """The fields of a dataclass, by name."""
    hints = get_type_hints(record)
    found = {}
    for field in fields(record):
        hint = hints[field.name]
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        parse = field.metadata.get("parse") or _parser(hint)
        found[field.name] = Setting(
            field.name, field.metadata["help"], parse, field.default, choices, is_switch=hint is bool
        )
    return found


def values_of(record: type, given: Mapping[str, object], where: str) -> dict[str, Any]:
    """The values that `given` (text, or what TOML holds) sets, by field of the dataclass `record`.

    Raises:
        ConfigError: an unknown key, or a value that cannot be read; the message begins with `where`.
    """
    known = settings_of(record)
    if unknown := [key for key in given if key not in known]:
        there = f"there are {', '.join(known)}" if known else "it has no settings"
        raise ConfigError(f"{where}: unknown key {', '.join(map(short, unknown))}; {there}")
    values = {}
    for key, value in given.items():
        try:
            values[key] = known[key].parse(as_text(value))
        except ConfigError as error:
            raise ConfigError(f"{where}: {key}: {error}") from error
    return values


def pairs(texts: Iterable[str], where: str) -> dict[str, str]:
    """key=value, one in each text.

    Raises:
        ConfigError: one is not of that form, or a key comes twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals):
            raise ConfigError(f"{where}: key=value is wanted; got {short(text)}")
        if key in found:
            raise ConfigError(f"{where}: {key} is given twice")
        found[key] = value
    return found


def read_toml(path: Path) -> dict[str, object]:
    """The keys of a TOML file. Raises ConfigError: it cannot be read, or is not TOML."""
    try:
        with opened(path, _MAX_BYTES) as file:
            return tomllib.loads(file.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read as TOML: {said}".replace("\n", " ")) from error


def as_text(value: object) -> str:
    """A TOML value as it would be typed; text as it is. Raises ConfigError: a table, a date, or lists in a list."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        try:
            return str(value)
        except ValueError as error:  # of thousands of digits
            raise ConfigError(str(error).partition(";")[0]) from error
    if isinstance(value, list) and not any(isinstance(one, list) for one in value):
        return "".join(f"{as_text(one)}," for one in value)
    raise ConfigError(f"text, a number, a boolean or a list of them is wanted; got {short(str(value))}")


def shortest(number: object) -> str:
    """A number as it is said: in the shortest way that is that number."""
    plain = f"{number:g}"
    return plain if float(plain) == number else repr(number)


def short(text: str) -> str:
    """Quoted, and cut where it is long."""
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def integer(text: str) -> int:
    """A whole number of up to 18 digits."""
    if not re.fullmatch("[+-]?[0-9]{1,18}", text):  # int() also takes other scripts' digits, and thousands of digits
        raise ConfigError(f"a whole number of at most 18 digits is wanted; got {short(text)}")
    return int(text)


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers joined by commas; one may end the text."""
    try:
        return tuple(integer(part) for part in listed(text))
    except ConfigError as error:
        raise ConfigError(f"whole numbers joined by commas are wanted: {error}") from error


def alternatives(text: str) -> tuple[int, ...]:
    """Whole numbers joined by slashes, each once."""
    try:
        found = tuple(integer(part) for part in text.split("/"))
    except ConfigError as error:
        raise ConfigError(f"whole numbers joined by slashes are wanted: {error}") from error
    if len(set(found)) < len(found):
        raise ConfigError(f"a number is there twice; got {short(text)}")
    return found


def real(text: str) -> float:
    """A number, infinite and NaN included."""
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"a number is wanted; got {short(text)}") from error


def reals(text: str) -> tuple[float, ...]:
    """Numbers joined by commas; one may end the text, and "none" is no number at all."""
    return () if text in ("", "none") else tuple(real(part) for part in listed(text))


def switch(text: str) -> bool:
    """True or false."""
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"true or false is wanted; got {short(text)}")
    return text.lower() == "true"


def tile(text: str) -> Tile:
    """One side, or p,q,s, or pxqxs."""
    numbers = integers(text.replace("x", ","))
    try:
        return as_tile(numbers[0] if len(numbers) == 1 else numbers)
    except ShapeError as error:
        raise ConfigError(str(error)) from error


def listed(text: str) -> tuple[str, ...]:
    """Parts between commas that are not in brackets; a comma may end the text."""
    parts = re.split(r",(?![^\[]*\])", text)
    return tuple(part.strip() for part in (parts[:-1] if len(parts) > 1 and not parts[-1].strip() else parts))


def _parser(hint: Any) -> Callable[[str], Any]:
    """How text becomes a value of this type."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = _parser(next(one for one in get_args(hint) if one is not type(None)))
        return lambda text: None if text == "none" else inner(text)
    if get_origin(hint) is Literal:
        return lambda text: _one_of(text, get_args(hint))
    simple: dict[Any, Callable[[str], Any]] = {
        str: str, int: integer, float: real, bool: switch,
        tuple[int, ...]: integers, tuple[float, ...]: reals, tuple[str, ...]: listed,
    }  # fmt: skip
    return simple[hint]


def _one_of(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ConfigError(f"one of {', '.join(choices)} is wanted; got {short(text)}")
    return text
