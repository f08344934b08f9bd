"""Published factors in: our own JSON, the FastMatrixMultiplication catalogue's JSON, AlphaTensor's NPZ.

The last two hold exact algorithms by what they are, so a file of theirs that does not multiply exactly is refused.
NPZ needs numpy and is never unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from strassen_tile.basis import Basis, read_json
from strassen_tile.errors import BasisError, ShapeError
from strassen_tile.tiling import Tile, as_tile

_CATALOGUE = {"n", "m", "u", "v", "w"}


def load(path: str | Path) -> Basis:
    """Read a basis from `path`: JSON of `Basis.save`, JSON of the catalogue, or NPZ.

    The catalogue's JSON has `n` (three sizes), `m` (rank) and `u`, `v`, `w`, each a list of m flat rows of numbers or
    strings such as "1/2". An NPZ has one key such as "4,4,4" whose array is the three factors, each (size, rank). In
    both the third factor may be stored transposed (s×p); whichever way multiplies exactly is taken.

    Raises:
        BasisError: unreadable, malformed, complex, pickled, or claiming to be exact and not being so (with its error).
    """
    source = Path(path)
    if source.suffix.lower() == ".npz":
        return _load_npz(source)
    record = read_json(source)
    if isinstance(record, dict) and set(record) >= _CATALOGUE:
        return _load_catalogue(record, source)
    return Basis.from_record(record, source=str(source))


def _load_catalogue(record: dict[str, object], source: Path) -> Basis:
    sizes, rank = record["n"], record["m"]
    if not isinstance(sizes, list) or not isinstance(rank, int):
        raise BasisError(f"{source}: n must be a list of three sizes and m the rank; got n={sizes!r}, m={rank!r}")
    try:
        p, q, s = as_tile(sizes)
    except ShapeError as error:
        raise BasisError(f"{source}: n must be a list of three sizes; got n={sizes!r}") from error
    factors = []
    for key, size in (("u", p * q), ("v", q * s), ("w", p * s)):
        rows = record[key]
        if not isinstance(rows, list) or len(rows) != rank:
            raise BasisError(f"{source}: {key} must be a list of m = {rank} rows")
        if any(not isinstance(row, list) or len(row) != size for row in rows):
            raise BasisError(f"{source}: every row of {key} must hold {size} coefficients for n = {sizes}")
        factors.append(torch.tensor([[_number(c, key, source) for c in row] for row in rows], dtype=torch.float64))
    return _exact(factors, (p, q, s), source)


def _number(coefficient: object, key: str, source: Path) -> float:
    try:
        if isinstance(coefficient, int | float | str) and not isinstance(coefficient, bool):
            # Fraction only where there is one: of "1e999999999" it would write out every digit.
            number = float(Fraction(coefficient) if "/" in str(coefficient) else coefficient)
            if math.isfinite(number):
                return number
    except (ValueError, ZeroDivisionError, OverflowError):
        pass
    raise BasisError(f"{source}: {key} holds {str(coefficient)[:40]!r}, which is not a real number or a fraction")


def _load_npz(source: Path) -> Basis:
    try:
        import numpy as np
    except ImportError as error:
        raise BasisError('reading an NPZ needs numpy: pip install "strassen-tile[files]"') from error
    try:
        with np.load(source, allow_pickle=False) as archive:
            keys = list(archive.files)
            if len(keys) != 1:
                raise BasisError(
                    f"{source} holds {len(keys)} entries ({', '.join(keys[:8])} …); one algorithm is wanted"
                )
            stacked = archive[keys[0]]
            if stacked.dtype.kind not in "iuf":
                raise BasisError(f"{source}: {keys[0]!r} holds {stacked.dtype}; real numbers are wanted")
            parts = [torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in stacked]
    except BasisError:
        raise
    except Exception as error:  # numpy raises many kinds for a damaged archive; a pickled one is a ValueError
        raise BasisError(
            f"cannot read {source}: {error}. It must hold one plain array of three factors, each (size, rank); "
            "object arrays are pickles and are not read: save the three factors padded or as JSON instead"
        ) from error
    try:
        tile = as_tile([int(side) for side in keys[0].split(",")])
    except ValueError as error:
        raise BasisError(f"{source}: the entry must be named like '4,4,4'; got {keys[0]!r}") from error
    p, q, s = tile
    if len(parts) != 3 or any(
        part.ndim != 2 or len(part) != n for part, n in zip(parts, (p * q, q * s, p * s), strict=True)
    ):
        raise BasisError(
            f"{source}: {keys[0]!r} must hold three factors (size, rank) of {p * q}, {q * s}, {p * s} rows"
        )
    return _exact([part.T for part in parts], tile, source)


def _exact(flat: Sequence[Tensor], tile: Tile, source: Path) -> Basis:
    """The exact basis with these flat factors (rank, size), the third stored either way."""
    p, q, s = tile
    encoder, weight_encoder, rank = flat[0].reshape(-1, p, q), flat[1].reshape(-1, q, s), len(flat[0])
    if len(flat[1]) != rank or len(flat[2]) != rank:
        raise BasisError(f"{source}: the three factors have {rank}, {len(flat[1])} and {len(flat[2])} terms")
    try:
        candidates = [
            Basis(encoder, weight_encoder, decoder, name=source.stem)
            for decoder in (flat[2].reshape(-1, p, s), flat[2].reshape(-1, s, p).mT)
        ]
    except BasisError as error:
        raise BasisError(f"{source}: {error}") from error
    best = min(candidates, key=lambda basis: basis.error)
    if not best.is_exact:
        raise BasisError(
            f"{source} claims to multiply {p}×{q} by {q}×{s} exactly, but its relative squared error is {best.error:.3g} "
            "(an algorithm over the integers modulo 2 is not one over the reals)"
        )
    return best
