"""Recipes in TOML files, changed by options: of images, of text, or of whatever else has a dataclass of settings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from strassen_tile.errors import ConfigError
from strassen_tile.experiments.settings import pairs, read_toml, settings_of, short, values_of

R = TypeVar("R")


def read(
    record: type[R],
    folder: Path,
    usual: Callable[[Mapping[str, Any]], str],
    name: str | None,
    changes: Sequence[str],
    options: Mapping[str, Any],
) -> R:
    """A recipe from its file, changed.

    Args:
        record: what it is read into.
        folder: of the recipes that come with the package.
        usual: the name of the recipe to take where none is named, by the values that are given.
        name: of a recipe that comes with the package, or the path of a TOML file.
        changes: key=value, each.
        options: values by key, of command-line options.

    Raises:
        ConfigError: no such recipe, an unknown key, a value that makes no sense, or one that is left open.
    """
    given = values_of(record, pairs(changes, "--set"), "--set")
    if twice := sorted(given.keys() & options.keys()):
        raise ConfigError(f"{', '.join(twice)}: given twice, by --set and by an option; leave one out")
    given |= options
    path = _file(folder, name if name is not None else usual(given))
    values = {**values_of(record, read_toml(path), str(path)), **given}
    missing = [key for key, one in settings_of(record).items() if one.default is MISSING and key not in values]
    if missing:
        ways = ", ".join(f"--{key.replace('_', '-')}" for key in missing)
        raise ConfigError(f"{path.name} leaves {', '.join(missing)} open; give {ways}")
    return record(**values)


def _file(folder: Path, name: str) -> Path:
    for spelt in (name, name.replace("_", "-")):  # fashion_mnist, as data sets are often written
        if (path := folder / f"{spelt}.toml").parent == folder and path.is_file():
            return path
    if Path(name).suffix == ".toml":
        with contextlib.suppress(RuntimeError):  # a home that nobody has: it is not found, then
            return Path(name).expanduser()
        return Path(name)
    known = ", ".join(sorted(path.stem for path in folder.glob("*.toml")))
    raise ConfigError(f"there is no recipe {short(name)}; there are {known}, or give the path of a .toml file")
