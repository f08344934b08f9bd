"""STL fitted to layers that are trained already, and what brings it nearer to its rivals, each measured on its own.

    python benchmarks/layer_fits.py --out benchmarks/results/layer-fits.json

Layers are those of all-MiniLM-L6-v2 reading the prose of Python's library: fitted to half of the rows, measured on the others.
Every row of the result is one way to spend about half of the dense product's FLOPs, all in.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from strassen_tile import bases, cost
from strassen_tile.baselines.aware import aware_svd, second_moment
from strassen_tile.baselines.sparse24 import mask_24, refit
from strassen_tile.experiments.real_layers import minilm
from strassen_tile.nn.alternate import fit_factors
from strassen_tile.nn.fit import encode_weight
from strassen_tile.records import environment, write_rows
from strassen_tile.reference import stl_linear

LAYERS = ("0.attention.self.query", "3.intermediate.dense")
APART, CUBE = (1, 4, 4), (4, 4, 4)
N = 4096  # rows that FLOPs are counted for


class Layer:
    """A product x w in float64: rows to fit to, rows to measure on."""

    def __init__(self, problem):
        self.name, self.w = problem.name, problem.w.double()
        self.rows, self.x = problem.rows.double(), problem.x.double()
        self.k, self.m = self.w.shape
        self.moment = second_moment(self.rows, self.k)

    def error(self, found, rows=None):
        x = self.x if rows is None else rows
        exact = x[: len(found)] @ self.w
        return float((found - exact).square().sum() / exact.square().sum())

    def ratio(self, tile, rank):
        return cost.linear(N, self.k, self.m, tile, rank).flop_ratio


def fitted(rows, x, w, basis, rounds, scope, low_rank=False):
    """What STL fitted to `rows` makes of x and of the rows."""
    encoder, decoder, (p, q, s) = basis.encoder.double(), basis.decoder.double(), basis.tile
    if scope == "tile":
        encoder = encoder.expand(-(-w.shape[0] // q), -1, -1, -1)
        decoder = decoder.expand(-(-w.shape[1] // s), -1, -1, -1)
    start = encode_weight(w, encoder, decoder)
    made = fit_factors(rows[None], w, encoder, start, decoder, rounds=rounds, low_rank=low_rank)

    def product(x):
        x = x[: len(x) // p * p]
        return stl_linear(x[None], made.encoded_weight, made.encoder, made.decoder, out_features=w.shape[1])[0]

    return product(x), product(rows)


def spread(energy):
    """An order in which the first place of every tile of four holds the features of most energy, the last those of least."""
    order = energy.argsort(descending=True)
    tiles = -(-len(order) // 4)
    return torch.cat([order[at::tiles] for at in range(tiles)])


def ways(layer, rounds):
    """(name, fraction of dense's FLOPs, what to do) of each way."""
    identity = torch.eye(layer.k, dtype=torch.float64)
    energies = layer.moment.diagonal() * layer.w.square().sum(dim=1)
    outputs = (layer.w * (layer.moment @ layer.w)).sum(dim=0)
    values, vectors = torch.linalg.eigh(layer.moment)
    rotated = (vectors.mT @ layer.w).square().sum(dim=1) * values

    def low_rank(ratio):
        a, b = aware_svd(layer.w, layer.moment, max(1, int(ratio * layer.k * layer.m / (layer.k + layer.m))))
        return a @ b

    def stl(basis, turn=identity, columns=None, w=layer.w, scope="layer", rounds=rounds, low_rank=False):
        columns = torch.arange(layer.m) if columns is None else columns
        back = columns.argsort()
        found = fitted(layer.rows @ turn, layer.x @ turn, (turn.mT @ w)[:, columns], basis, rounds, scope, low_rank)
        return tuple(part[:, back] for part in found)

    def with_low_rank(rank, ratio):
        near = low_rank(ratio)
        found, own = stl(bases.random(APART, rank), w=layer.w - near, scope="tile")
        return found + (layer.x @ near)[: len(found)], own + (layer.rows @ near)[: len(own)]

    def halves(high, low):
        order = rotated.argsort(descending=True)
        found = [0.0, 0.0]
        for part, rank in zip(order.chunk(2), (high, low), strict=True):
            turn = vectors[:, part]
            made = fitted(
                layer.rows @ turn, layer.x @ turn, turn.mT @ layer.w, bases.random(APART, rank), rounds, "tile"
            )
            found = [total + one for total, one in zip(found, made, strict=True)]
        return found

    def alone(**options):
        return stl(bases.random(APART, 7), **options)

    def larger(side, **options):
        tile, rank = (1, side, side), 1
        while layer.ratio(tile, rank + 1) <= 0.5:
            rank += 1
        return layer.ratio(tile, rank), lambda: stl(bases.random(tile, rank), scope="tile", **options)

    apart, cube, third = layer.ratio(APART, 7), layer.ratio(CUBE, 24), layer.ratio(APART, 3)
    turned, outward, ordered = vectors[:, spread(rotated)], spread(outputs), identity[:, spread(energies)]
    return [
        ("low rank, aware of rows", 0.5, lambda: (layer.x @ low_rank(0.5), layer.rows @ low_rank(0.5))),
        ("2:4, refitted", 0.5, lambda: sparse(layer)),
        ("STL r=24 of 4×4×4 from a random start", cube, lambda: stl(bases.random(CUBE, 24))),
        ("STL r=24 of 4×4×4 from the searched basis", cube, lambda: stl(bases.approximate(CUBE, 24))),
        ("STL r=7 of 1×4×4", apart, alone),
        ("encoders of each tile", apart, lambda: alone(scope="tile")),
        ("of each tile, four times the rounds", apart, lambda: alone(scope="tile", rounds=4 * rounds)),
        ("of each tile, features ordered by energy", apart, lambda: alone(scope="tile", turn=ordered, columns=outward)),
        ("of each tile, inputs turned to principal directions", apart,
         lambda: alone(scope="tile", turn=turned, columns=outward)),
        ("the same turned, r=10 for the stronger half, 4 for the other", apart, lambda: halves(10, 4)),
        ("r=3 and low rank, encoders of each tile", 0.5, lambda: with_low_rank(3, 0.5 - third)),
        ("of each tile of 1×8×8", *larger(8)),
        ("of each tile of 1×8×8, four times the rounds", *larger(8, rounds=4 * rounds)),
        ("of each tile of 1×8×8, turned, four times the rounds", *larger(8, rounds=4 * rounds, turn=turned, columns=outward)),
        ("of each tile of 1×16×16, four times the rounds", *larger(16, rounds=4 * rounds)),
        ("of each tile, from low rank", apart, lambda: alone(scope="tile", low_rank=True)),
        ("of each tile of 1×8×8, from low rank", *larger(8, low_rank=True)),
        ("of each tile of 1×16×16, from low rank", *larger(16, low_rank=True)),
        ("of each tile of 1×32×32, from low rank", *larger(32, low_rank=True)),
        ("of each tile of 1×64×64, from low rank", *larger(64, low_rank=True)),
        ("of each tile of 1×32×32, from low rank, turned", *larger(32, low_rank=True, turn=turned, columns=outward)),
    ]  # fmt: skip


def sparse(layer):
    weight, rows = layer.w.mT.contiguous().float(), layer.rows.float()
    kept = refit(weight, mask_24(weight, rows), rows).double().mT
    return layer.x @ kept, layer.rows @ kept


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a .json file")
    parser.add_argument("--rows", type=int, default=16384, help="to measure on, and as many to fit to, at most")
    parser.add_argument("--pieces", type=int, default=640, help="of text to read")
    parser.add_argument("--rounds", type=int, default=8, help="of fitting Ŵ, E and D in turn")
    options = parser.parse_args()
    rows, where = [], environment(shlex.join(["python", "benchmarks/layer_fits.py", *sys.argv[1:]]))
    for problem in minilm(LAYERS, options.rows, options.pieces):
        layer = Layer(problem)
        for name, ratio, make in ways(layer, options.rounds):
            begun = time.perf_counter()
            found, own = make()
            rows.append({
                "layer": layer.name, "way": name, "flop_ratio": ratio, "error": layer.error(found),
                "error_fitted": layer.error(own, layer.rows), "rows_fitted": len(layer.rows), "rows": len(layer.x),
                "rounds": options.rounds, **where,
            })  # fmt: skip
            write_rows(options.out, rows)
            print(f"{layer.name}: {name}: {ratio:.3f} of the FLOPs, error {rows[-1]['error']:.4f}, "
                  f"{time.perf_counter() - begun:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
