"""Approximate products of given matrices: error and cosine of every way to spend a budget, beside FLOPs and seconds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tokenize import TokenError

import torch
from torch import Tensor

from strassen_tile import files
from strassen_tile.baselines.products import Prepared, Product, dense
from strassen_tile.baselines.roster import ROSTER, Way, ways
from strassen_tile.errors import ConfigError, DataError, ShapeError, shape_text
from strassen_tile.experiments.pairs import interleave
from strassen_tile.records import Row, environment

MAX_BYTES = 4 << 30  # of a user's file
TRIALS = 10
_CALIBRATION = 4096  # Gaussian rows for what is fitted to rows


@dataclass(frozen=True)
class Problem:
    """A product to approximate.

    Attributes:
        name: of the data, and of the layer.
        x: (N, K), what is multiplied.
        w: (K, M).
        rows: (R, K), others of x's kind, for what is fitted to rows.
        gaussian: whether all entries are independent normal ones, of which errors are predicted.
    """

    name: str
    x: Tensor
    w: Tensor
    rows: Tensor
    gaussian: bool = False


def gaussian(n: int, k: int, m: int, seed: int = 0) -> Problem:
    """Independent normal entries, of which nothing can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    x, w, rows = (torch.randn(size, generator=generator) for size in ((n, k), (k, m), (_CALIBRATION, k)))
    return Problem(f"gaussian {n}×{k}×{m}", x, w / k**0.5, rows, gaussian=True)


def pair(x: Tensor, w: Tensor, name: str, seed: int = 0) -> Problem:
    """A user's matrices: half of the rows of x, drawn at random, to fit to, and the others to measure on.

    Raises:
        ShapeError: not (N, K) and (K, M) with at least two rows, numbers that are not finite in float32, or a product that is
            not, or is zero.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0] or len(x) < 2 or not w.numel():
        raise ShapeError(
            f"{name}: x must be (N, K) with two rows or more, w (K, M); got {shape_text(x.shape)}, {shape_text(w.shape)}"
        )
    for which, matrix in (("x", x), ("w", w)):
        if matrix.is_complex() or matrix.dtype.itemsize < 2:
            raise ShapeError(f"{name}: {which} must hold real numbers of 16 bits or more; got {matrix.dtype}")
        if not bool(torch.isfinite(matrix.float()).all()):
            raise ShapeError(f"{name}: {which} holds numbers that are not finite in float32")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    half = len(x) // 2
    rows, measured, w = x[order[:half]].float(), x[order[half:]].float(), w.float()
    product = measured @ w
    if not bool(torch.isfinite(product).all()):
        raise ShapeError(f"{name}: x w overflows float32; scale x or w down")
    if not bool(product.any()):
        raise ShapeError(
            f"{name}: x w is all zeros on the half of the rows that is measured (drawn at random; the other is fitted to): "
            "there is nothing to approximate"
        )
    return Problem(name, measured, w, rows)


def read_pair(text: str) -> Problem:
    """The problem in a `.safetensors` file with tensors x and w, or in two `.npy` files, "X.npy,W.npy".

    Raises:
        DataError: a file that is missing, damaged, too large or of another kind.
        ShapeError: as `pair`.
    """
    try:
        paths = [Path(part).expanduser() for part in text.split(",")]
    except RuntimeError as error:  # no such user
        raise DataError(f"cannot find {text!r}: {error}") from error
    if len(paths) == 2 and all(path.suffix == ".npy" for path in paths):
        return pair(_npy(paths[0]), _npy(paths[1]), text)
    if len(paths) != 1 or paths[0].suffix != ".safetensors":
        raise DataError(
            f"data must be gaussian, minilm, a .safetensors file with x and w, or X.npy,W.npy; got {text!r}"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        with files.opened(paths[0], MAX_BYTES) as file:
            found = load(file.read())
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {paths[0]}: {error}") from error
    if not {"x", "w"} <= set(found):
        raise DataError(f"{paths[0]} must have tensors x and w; it has {', '.join(sorted(found)) or 'none'}")
    return pair(found["x"], found["w"], text)


def _npy(path: Path) -> Tensor:
    import numpy as np

    try:
        with files.opened(path, MAX_BYTES) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (
        OSError,
        ValueError,
        EOFError,
        SyntaxError,
        OverflowError,
        TokenError,
    ) as error:  # a header is Python's text
        raise DataError(f"cannot read {path}: {error}") from error
    if array.dtype.kind not in "fiu":
        raise DataError(f"{path} must hold real numbers; got {array.dtype}")
    return torch.from_numpy(array.astype("float64"))


def measure(
    problems: Sequence[Problem], methods: Sequence[str], budgets: Sequence[float], *, trials: int = TRIALS,
    seconds: float = 0.2,
) -> Iterator[Row]:  # fmt: skip
    """A row for each problem, method and budget that pays for something (`left_out` says which do not).

    Args:
        problems: what is multiplied.
        methods: of `roster.APPROXIMATIONS`.
        budgets: fractions of the dense product's FLOPs; methods that have but some are measured at those.
        trials: with as many seeds, of what is drawn.
        seconds: for the time of each beside dense's, in turn.

    Raises:
        ConfigError: an unknown method, or numbers that make no sense.
    """
    if own := [name for name, way in ways(methods).items() if way.near is None]:
        raise ConfigError(f"{', '.join(own)} is a layer of its own, and comes near no x @ w; leave it out")
    if not budgets or not all(0 < budget <= 1 for budget in budgets):
        raise ConfigError(f"budgets must be fractions of dense's FLOPs, above 0 and up to 1; got {budgets}")
    if trials < 1 or not seconds > 0:
        raise ConfigError(f"trials and seconds must be positive; got {trials} and {seconds}")
    return _rows(problems, methods, budgets, trials, seconds)


def left_out(
    problems: Sequence[Problem], methods: Sequence[str], budgets: Sequence[float], rows: Sequence[Row]
) -> list[str]:
    """What of all that was asked for has no row, since the budget pays for nothing at these sizes: "low-rank at 0.01 of x"."""
    there = {(row["data"], row["method"], row["budget"]) for row in rows}
    asked = [
        (problem.name, name, budget)
        for problem in problems
        for name in methods
        for budget in ROSTER[name].budgets or budgets
    ]
    return [f"{name} at {budget:g} of {data}" for data, name, budget in asked if (data, name, budget) not in there]


def _rows(
    problems: Sequence[Problem], methods: Sequence[str], budgets: Sequence[float], trials: int, seconds: float
) -> Iterator[Row]:
    where = environment()
    for problem in problems:
        exact = problem.x.double() @ problem.w.double()
        run_dense = dense().prepare(problem.w)
        for name in methods:
            way = ROSTER[name]
            for budget in way.budgets or budgets:
                row = _measured(problem, name, way, budget, trials, seconds, exact, run_dense)
                if row is not None:
                    yield {**row, **where}


def _measured(
    problem: Problem,
    name: str,
    way: Way,
    budget: float,
    trials: int,
    seconds: float,
    exact: Tensor,
    run_dense: Prepared,
) -> Row | None:
    (n, k), m = problem.x.shape, problem.w.shape[1]
    errors, cosines = [], []
    product: Product | None = None
    for seed in range(trials if way.drawn else 1):
        product = way.nearest(budget, (n, k, m), seed)
        if product is None:
            return None
        prepared = product.prepare(problem.w, problem.rows)
        with torch.no_grad():
            found = prepared.call(problem.x).double()
        errors.append(float((found - exact).square().sum() / exact.square().sum()))
        cosines.append(float(torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)))
    assert product is not None
    with torch.no_grad():
        pairs = interleave(partial(_run, run_dense, problem.x), partial(_run, prepared, problem.x), seconds, "cpu")
    predicted = product.error if problem.gaussian else None
    return {
        "data": problem.name, "n": n, "k": k, "m": m, "method": name, "budget": budget,
        "basis": _basis(product) if name == "stl" else "", "rank": product.rank,
        "flop_ratio": product.cost(n, k, m).flop_ratio,
        "error": statistics.fmean(errors),
        "error_sd": statistics.stdev(errors) if len(errors) > 1 else None,
        "cosine": statistics.fmean(cosines),
        "predicted": predicted,
        "trials": len(errors),
        "time_ratio": statistics.median(second / first for first, second in pairs),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _basis(product: Product) -> str:
    return f"stl {shape_text(product.tile or ())} r={product.rank}"


def _run(prepared: Prepared, x: Tensor) -> None:
    prepared.call(x)
