"""What can go wrong. Every message names the argument, what was given, and the way out.

All of them are `ValueError`s, so callers who do not know this package can still catch them.
"""

from __future__ import annotations

from collections.abc import Sequence


class STLError(ValueError):
    """Base of the errors raised by strassen_tile."""


class ShapeError(STLError):
    """An argument has a shape, dtype or device the operator cannot take."""


class BasisError(STLError):
    """A basis is malformed, not what it claims to be, or not available."""


class ConfigError(STLError):
    """A configuration has an unknown key or a value that makes no sense."""


class BasisMismatchError(BasisError, ConfigError):
    """A basis that exists is not for the tile or rank it is asked for."""


class ConversionError(STLError):
    """A model cannot be converted as asked."""


class CheckpointError(STLError):
    """A saved model is damaged, of another model, or of a newer version."""


class DataError(STLError):
    """A data file is missing or malformed; the message names the file."""


class BackendError(STLError):
    """The backend asked for by name cannot run these arguments here."""


class DivergedError(STLError):
    """Training came to a loss or to weights that are not finite.

    Attributes:
        epoch: in which that was noticed, from 1.
        step: the first with such a loss, from 1 over all epochs; the last of the epoch where it was seen in the weights.
    """

    def __init__(self, message: str, *, epoch: int = 0, step: int = 0) -> None:  # defaults: it can be pickled
        super().__init__(message)
        self.epoch, self.step = epoch, step


def shape_text(shape: Sequence[object]) -> str:
    """`(2, 3)` for any sequence of sizes, symbolic ones included."""
    return "(" + ", ".join(str(size) for size in shape) + ")"
