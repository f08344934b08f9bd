"""Where a layer starts: encoders, decoders and the scale of a random Ŵ.

With Var(X) = 1 per entry, X̂[k] has variance ‖E_k‖² and Y variance Σ_k ‖D_k‖²/(ps) · (K/q) · Var(Ŵ) · ‖E_k‖², if Ŵ is
independent noise. A dense layer has K·Var(W): equating the two gives Var(Ŵ). It holds for any E and D; what else a start
chooses is which directions they span.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strassen_tile.basis import Basis
from strassen_tile.errors import ConfigError
from strassen_tile.nn.config import STLConfig


def causal_masks(p: int, rank: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Where E and D may be non-zero if no row is to see a later one: two bool tensors (r, p, 1).

    Term k has a split t_k = ⌊k·p/r⌋; E_k lives on rows ≤ t_k and D_k on rows ≥ t_k. With a free Ŵ this is every
    causal operator of the rank.
    """
    split = (torch.arange(rank, device=device) * p).div(rank, rounding_mode="floor")[:, None, None]
    row = torch.arange(p, device=device)[None, :, None]
    return row <= split, row >= split


def normalised(basis: Basis) -> Basis:
    """The same algorithm with ‖E_k‖ = 1 and ‖F_k‖ = √q, so that X̂ and Ŵ have the scale that a random start gives them.

    Terms of a best approximation can be large and cancel; left as they are they train badly.
    """
    _, q, _ = basis.tile
    e = basis.encoder.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12)
    f = basis.weight_encoder.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-12) / q**0.5
    return Basis(basis.encoder / e, basis.weight_encoder / f, basis.decoder * e * f, name=basis.name)


def _drawn(kind: str, copies: tuple[int, ...], rank: int, rows: int, columns: int) -> Tensor:
    """A factor (*copies, rank, rows, columns) in float64 whose entries have mean square 1."""
    shape = (*copies, rank, rows, columns)
    if kind == "random":
        return torch.randn(shape, dtype=torch.float64)
    if kind == "signs":
        return torch.randint(0, 2, shape).double().mul_(2).sub_(1)
    factor = torch.empty(shape, dtype=torch.float64)
    for matrix in factor.view(-1, rank, rows * columns):  # orthonormal along the shorter side
        torch.nn.init.orthogonal_(matrix, gain=max(matrix.shape) ** 0.5)
    return factor


def start_factors(config: STLConfig, basis: Basis | None, columns: int, outputs: int) -> tuple[Tensor, Tensor]:
    """E and D in float64, for `columns` = ⌈K/q⌉ and `outputs` = ⌈M/s⌉ where the scope is "tile".

    Without a basis they are drawn as `config.basis` says, from torch's global generator, as `nn.Linear` draws its
    weight, with the variances of `bases.random`; causal ones so that every row of Y gets the same variance. With
    `init="spectral"` what is drawn is scaled down by √(d_out/d_in) where that is less than 1.

    Raises:
        ConfigError: a given basis is not causal though the mixing is.
    """
    (p, q, s), r = config.pqs, config.rank
    per_tile = config.encoder_scope == "tile"
    masks = causal_masks(p, r) if config.mixing == "causal" else None
    if basis is not None:
        encoder, decoder = basis.encoder, basis.decoder
        if masks is not None and not (
            torch.equal(encoder * masks[0], encoder) and torch.equal(decoder * masks[1], decoder)
        ):
            raise ConfigError(
                f"basis {config.basis!r} lets rows see later ones; mixing='causal' takes 'random', 'signs' or 'naive'"
            )
        if per_tile:
            encoder, decoder = encoder.expand(columns, -1, -1, -1), decoder.expand(outputs, -1, -1, -1)
        return encoder.clone(), decoder.clone()
    encoder = _drawn(config.basis, (columns,) if per_tile else (), r, p, q)
    decoder = _drawn(config.basis, (outputs,) if per_tile else (), r, p, s)
    if config.init == "spectral":
        encoder, decoder = encoder * min(1.0, (r / (p * q)) ** 0.5), decoder * min(1.0, (p * s / r) ** 0.5)
    if masks is None:
        return encoder.div_((p * q) ** 0.5), decoder.div_(r**0.5)
    rows_read = masks[0].sum(dim=1, keepdim=True)  # entries of E_k that are alive
    terms_written = masks[1].sum(dim=0, keepdim=True)  # terms that reach a row of Y
    return encoder * masks[0] / (rows_read * q) ** 0.5, decoder * masks[1] / terms_written**0.5


def start_deviation(
    config: STLConfig, encoder: Tensor, decoder: Tensor, tiles: tuple[int, int], variance: float
) -> float:
    """Standard deviation of a random Ŵ: by `weight_deviation`, or for `tiles` = (⌈K/q⌉, ⌈M/s⌉) by the rule of "spectral"."""
    if config.init != "spectral":
        return weight_deviation(encoder, decoder, variance)
    columns, outputs = (max(1, n) for n in tiles)
    return float(columns**-0.5 * min(1.0, (outputs / columns) ** 0.5))


def weight_deviation(encoder: Tensor, decoder: Tensor, variance: float) -> float:
    """Standard deviation of Ŵ that gives Y the variance a dense weight of `variance` would, averaged over rows."""
    p, s = decoder.shape[-2:]
    r, _, q = encoder.shape[-3:]
    energy_in = torch.linalg.vector_norm(encoder, dim=(-2, -1)).square().reshape(-1, r).mean(dim=0)
    energy_out = torch.linalg.vector_norm(decoder, dim=(-2, -1)).square().reshape(-1, r).mean(dim=0)
    per_tile_product = float(energy_in @ energy_out) / (p * s)
    return float((q * variance / per_tile_product) ** 0.5) if per_tile_product > 0 else 0.0
