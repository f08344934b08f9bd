"""What the console script's arguments are: parsers of their text, which say in one line what is wrong with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NoReturn

from strassen_tile.errors import STLError
from strassen_tile.experiments import settings
from strassen_tile.files import parse_json


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which shows the messages of its own error alone."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except STLError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


integer, integers, real, reals, names, tile = map(
    _argument,
    (settings.integer, settings.integers, settings.real, settings.reals, settings.listed, settings.tile),
)


def folder(text: str) -> Path:
    """A path, `~` expanded."""
    try:
        if text.strip():
            return Path(text).expanduser()
    except RuntimeError as error:  # a home that nobody has
        raise argparse.ArgumentTypeError(f"{error}; got {settings.short(text)}") from error
    raise argparse.ArgumentTypeError("the path of a folder is wanted, '.' for this one; got an empty one")


def json_object(text: str) -> dict[str, object]:
    """A JSON object."""
    try:
        found = parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a JSON object is wanted; got {settings.short(text)}: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f'a JSON object such as {{"image_size": 224}} is wanted; got {settings.short(text)}'
        )
    return found


def shapes_of_inputs(text: str) -> object:
    """Shapes as JSON, or "dummy"."""
    try:
        found = text if text == "dummy" else parse_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"shapes as JSON are wanted, or dummy; got {settings.short(text)}: {error}"
        ) from error
    if not isinstance(found, str | dict | list):
        raise argparse.ArgumentTypeError(
            f"a JSON object or list of shapes is wanted, or dummy; got {settings.short(text)}"
        )
    return found


def add_settings(command: Parser, record: type) -> None:
    """An option for each field of the dataclass. One that is not given leaves no attribute: a recipe may say it."""
    for setting in settings.settings_of(record).values():
        default = "by recipe" if setting.default is MISSING else _shown(setting.default)
        more: dict[str, Any] = {"type": _argument(setting.parse), "metavar": "|".join(setting.choices) or None}
        if setting.is_switch:
            more = {"action": argparse.BooleanOptionalAction}
        command.add_argument(
            f"--{setting.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=f"{setting.help} (default: {default})".replace("%", "%%"),
            **more,
        )


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
