"""What other libraries need to know of this one. Each is imported by the user, never by us."""

from __future__ import annotations

import warnings
from functools import partial
from importlib import import_module

from strassen_tile.integrations.when_imported import when_imported


def register() -> None:
    """Make ourselves known to transformers, now or when it is imported."""
    when_imported("transformers.quantizers.auto", partial(_transformers, "quantization"))
    when_imported("transformers.modeling_utils", partial(_transformers, "transformers"))


def _transformers(part: str) -> None:
    try:
        import_module(f"strassen_tile.integrations.{part}")
    except ImportError as error:  # another version than we know: it must not be kept from being imported
        warnings.warn(f"converted models cannot be saved with this version of transformers: {error}", stacklevel=2)
