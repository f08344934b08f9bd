"""Products by convolutions of few degrees, beside dropping products and beside the best low rank of the result.

    python benchmarks/convolutions.py --out benchmarks/results/convolutions.json

Two products of m×m matrices in one convolution over Z_n³, n = m + 1 (Cohn, Kleinberg, Szegedy and Umans 2005: the smallest
sets of the simultaneous triple product property), as a basis of the tile m×2m×m: the Fourier transform makes a product of each
character. Of low degree are those with few coordinates other than zero. A complex pair takes three real products. Decoders are
the best for the terms kept, so that no other decoding of them errs less on Gaussian matrices.

The last column is the error of the best rank-r approximation of x w, for Gaussian x and w of side N, r = the same fraction of N
as the products are of dense's: it takes as many multiplications as r·N² of them, once its factors are known.
"""

import argparse
import itertools
import shlex
import sys
from pathlib import Path

import torch

from strassen_tile import Basis
from strassen_tile.records import environment, write_rows

SIDE, TRIALS = 256, 5


def characters(n, most):
    """One of each pair u, −u in Z_n³ with at most so many coordinates that are not zero, and whether it is its own opposite."""
    for u in itertools.product(range(n), repeat=3):
        opposite = tuple(-c % n for c in u)
        if sum(map(bool, u)) <= most and u <= opposite:
            yield torch.tensor(u), u == opposite


def terms(n, most):
    """E (r, m, 2m) and F (r, 2m, m) of the characters kept."""
    m = n - 1
    a, b = torch.meshgrid(torch.arange(1, n), torch.arange(1, n), indexing="ij")
    zero = torch.zeros_like(a)
    # Where entries of the two matrices of x (aᵢ⁻¹ bⱼ) and of w (bⱼ⁻¹ cₖ) stand in the group; rows a or b, columns b or c.
    of_x = torch.stack([torch.stack([-a, b, zero], -1), torch.stack([zero, -a, b], -1)])
    of_w = torch.stack([torch.stack([zero, -a, b], -1), torch.stack([b, zero, -a], -1)])
    encoders, weight_encoders = [], []
    for u, real in characters(n, most):
        x, w = (
            torch.polar(torch.ones(2, m, m, dtype=torch.float64), 2 * torch.pi / n * (at @ u).double())
            for at in (of_x, of_w)
        )
        e, f = torch.cat(list(x), dim=1), torch.cat(list(w), dim=0)
        parts = [(e.real, f.real)]
        if not real:
            parts += [(e.imag, f.imag), (e.real + e.imag, f.real + f.imag)]
        encoders += [one for one, _ in parts]
        weight_encoders += [other for _, other in parts]
    return torch.stack(encoders), torch.stack(weight_encoders)


def low_rank_errors(generator):
    """By rank, the relative squared error of the best approximation of a product of Gaussian matrices of side SIDE."""
    squares = []
    for _ in range(TRIALS):
        x, w = (torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
        squares.append(torch.linalg.svdvals(x @ w).square())
    energy = torch.stack(squares).mean(0)
    return 1 - energy.cumsum(0) / energy.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[4, 6, 8, 10], help="n")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file of rows")
    options = parser.parse_args()
    where = {**environment(), "command": shlex.join(["python", "benchmarks/convolutions.py", *sys.argv[1:]])}
    best, rows = low_rank_errors(torch.Generator().manual_seed(0)), []
    for n in options.sides:
        m = n - 1
        for degree in (1, 2, 3):
            e, f = terms(n, degree)
            basis = Basis(e, f, torch.zeros(len(e), m, m, dtype=torch.float64)).refit_decoder()
            ratio = len(e) / (2 * m**3)
            rank = round(ratio * SIDE)
            row = {
                "tile": f"{m}x{2 * m}x{m}", "n": n, "degree": degree, "products": len(e), "ratio": ratio, "error": basis.error,
                "dropping": max(0.0, 1 - ratio), "low_rank": float(best[rank - 1]) if 0 < rank < SIDE else 0.0,
            }  # fmt: skip
            rows.append({**row, "side": SIDE, "trials": TRIALS, **where})
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
            write_rows(options.out, rows)


if __name__ == "__main__":
    main()
