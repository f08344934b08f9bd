"""Basis: the three factors of a bilinear algorithm for a tile product, and what can be said of them.

A basis (E, F, D) of rank r for the tile ⟨p, q, s⟩ computes, from a p×q tile X and a q×s tile W,

    Y = Σ_k D_k ⟨E_k, X⟩ ⟨F_k, W⟩,   k = 1 … r,

a p×s tile which is X @ W if the basis is exact, and an approximation of it otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strassen_tile import algebra, basis_record
from strassen_tile.basis_record import FACTORS, MAX_BYTES
from strassen_tile.errors import BasisError, shape_text
from strassen_tile.tiling import Tile, as_integer, as_tile

EXACT_BELOW = 1e-24  # relative squared error: 1e-12 in relative error, what float64 coefficients such as 1/3 allow


@dataclass(frozen=True, eq=False, repr=False)
class Basis:
    """Three factors: `encoder` E (r, p, q), `weight_encoder` F (r, q, s), `decoder` D (r, p, s).

    Tensors, arrays and nested lists are accepted; inside they are float64 tensors on the CPU, not to be written to. Of the name
    what cannot be printed on a line is replaced.

    Raises:
        BasisError: not numbers, shapes that do not fit together, rank 0, complex or non-finite coefficients.
    """

    encoder: Tensor
    weight_encoder: Tensor
    decoder: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        # It is written into files and onto terminals.
        name = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(self.name))
        object.__setattr__(self, "name", name)
        for field in FACTORS:
            value = getattr(self, field)
            try:
                if not isinstance(value, Tensor):  # Python's numbers are float64; torch's default would round them
                    value = torch.tensor(value, dtype=None if hasattr(value, "dtype") else torch.float64, device="cpu")
                if value.is_complex():
                    raise TypeError("it is complex")
                with torch.inference_mode(False):  # a basis may outlive the mode it was made in
                    factor = value.detach().to("cpu", torch.float64, copy=True).contiguous()
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise BasisError(f"{field} is not a rectangular array of real numbers: {error}") from error
            if factor.ndim != 3 or 0 in factor.shape:
                raise BasisError(f"{field} must have three non-empty dimensions; got shape {shape_text(factor.shape)}")
            if not bool(torch.isfinite(factor).all()):
                raise BasisError(f"{field} holds a coefficient that is not finite")
            object.__setattr__(self, field, factor)
        (r, p, q), weight, decoder = self.encoder.shape, self.weight_encoder.shape, self.decoder.shape
        if weight[0] != r or decoder[0] != r or weight[1] != q or decoder[1] != p or decoder[2] != weight[2]:
            raise BasisError(
                "factors do not fit together: encoder (r, p, q), weight_encoder (r, q, s), decoder (r, p, s) are wanted; "
                f"got {shape_text(self.encoder.shape)}, {shape_text(weight)}, {shape_text(decoder)}"
            )

    @property
    def tile(self) -> Tile:
        """(p, q, s)."""
        return self.encoder.shape[1], self.encoder.shape[2], self.weight_encoder.shape[2]

    @property
    def rank(self) -> int:
        """r, the number of multiplications a tile product takes."""
        return self.encoder.shape[0]

    @property
    def flop_ratio(self) -> float:
        """FLOPs of the r products as a fraction of the dense product's: r/(pqs). Encoding and decoding not included."""
        p, q, s = self.tile
        return self.rank / (p * q * s)

    @property
    def param_ratio(self) -> float:
        """Numbers in Ŵ as a fraction of those in W: r/(qs). Above 1 the layer has more parameters than a dense one."""
        _, q, s = self.tile
        return self.rank / (q * s)

    @cached_property
    def error(self) -> float:
        """‖T − Σ_k E_k⊗F_k⊗D_k‖²/pqs, T the ⟨p,q,s⟩ matrix-multiplication tensor.

        This is the expected relative squared error on independent Gaussian X and W; 0 for an exact basis.
        """
        return algebra.squared_error((self.encoder, self.weight_encoder, self.decoder))

    @cached_property
    def kappa(self) -> float:
        """Σ_k ‖E_k‖²‖F_k‖²‖D_k‖²/pqs: the relative rms rounding error is about u·√(kappa·n) after n roundings to u."""
        p, q, s = self.tile
        norms = [getattr(self, field).square().sum(dim=(1, 2)) for field in FACTORS]
        return float((norms[0] * norms[1] * norms[2]).sum()) / (p * q * s)

    @cached_property
    def growth_factor(self) -> float:
        """Σ_k ‖E_k‖‖F_k‖‖D_k‖, which bounds the rounding error of the result in units of u ‖X‖‖W‖ (arXiv 2402.05630).

        14.83 for Strassen's algorithm as he wrote it, 12.07 for the best of its equivalents that `conditioned` finds.
        """
        norms = [getattr(self, field).flatten(1).norm(dim=1) for field in FACTORS]
        return float((norms[0] * norms[1] * norms[2]).sum())

    @property
    def is_exact(self) -> bool:
        """Whether the basis computes X @ W, to float64 rounding of its coefficients."""
        return self.error <= EXACT_BELOW

    def kron(self, other: Basis) -> Basis:
        """The basis for tiles of tiles: `self` on the outer blocks, `other` inside; ranks and tile sides multiply."""
        factors = []
        for field in FACTORS:
            outer, inner = getattr(self, field), getattr(other, field)
            product = torch.einsum("kab,lcd->klacbd", outer, inner)
            rows, columns = outer.shape[1] * inner.shape[1], outer.shape[2] * inner.shape[2]
            factors.append(product.reshape(self.rank * other.rank, rows, columns))
        name = f"{self.name}*{other.name}" if self.name and other.name else ""
        return Basis(factors[0], factors[1], factors[2], name=name)

    def cycle(self) -> Basis:
        """The basis for ⟨q, s, p⟩ that the cyclic symmetry of the trace tr(X W Z) gives; same error and kappa."""
        return Basis(self.weight_encoder, self.decoder.mT, self.encoder.mT, name=self.name)

    def transpose(self) -> Basis:
        """The basis for ⟨s, q, p⟩ that (X W)ᵀ = Wᵀ Xᵀ gives; same error and kappa."""
        return Basis(self.weight_encoder.mT, self.encoder.mT, self.decoder.mT, name=self.name)

    def oriented(self, tile: int | Sequence[int]) -> Basis:
        """The basis for the same three sides in another order, by `cycle` and `transpose`; same error and kappa.

        Raises:
            BasisError: other sides.
        """
        wanted = as_tile(tile)
        for candidate in (self, self.transpose()):
            for _ in range(3):
                if candidate.tile == wanted:
                    return candidate
                candidate = candidate.cycle()
        raise BasisError(f"a basis for {self.tile} cannot serve {wanted}: it is no other order of its sides")

    def conditioned(self, *, starts: int = 4, seed: int = 0) -> Basis:
        """The equivalent exact basis of the least kappa found: `algebra.least_kappa`. Its coefficients are no fractions.

        Args:
            starts: of the descent; more of them may find less.
            seed: of the starts.

        Raises:
            BasisError: the basis is an approximation, whose error would change, or starts is no positive integer.
        """
        if not self.is_exact:
            raise BasisError(
                f"conditioned keeps exact bases exact; this one has a relative squared error of {self.error:.3g}, "
                "which would change"
            )
        if (as_integer(starts) or 0) < 1 or as_integer(seed) is None:
            raise BasisError(f"starts must be a positive integer and seed an integer; got {starts!r} and {seed!r}")
        factors = self.encoder, self.weight_encoder, self.decoder
        found = Basis(*algebra.least_kappa(factors, starts=starts, seed=seed), name=self.name).balance()
        return found if found.is_exact and found.kappa < self.kappa else self

    def refit_decoder(self) -> Basis:
        """The same encoders with the decoder of least error: D = argmin ‖T − Σ_k E_k⊗F_k⊗D_k‖ (least norm if several).

        ⟨T, E_k⊗F_k⊗·⟩ = E_k F_k, and the Gram matrix of E_k⊗F_k is G_E ∘ G_F. Raises BasisError where that overflows.
        """
        gram = self._gram("encoder") * self._gram("weight_encoder")
        if not bool(torch.isfinite(gram).all()):
            raise BasisError("the encoders' coefficients are too large to refit to: their products overflow")
        target = self.encoder @ self.weight_encoder
        decoder = torch.linalg.lstsq(gram, target.flatten(1), driver="gelsd").solution
        return replace(self, decoder=decoder.reshape(target.shape))

    def refit_weight_encoder(self) -> Basis:
        """The same E and D with the weight encoder of least error (least norm if several)."""
        # By the cyclic symmetry F is the decoder of ⟨s, p, q⟩ transposed.
        return self.cycle().cycle().refit_decoder().cycle()

    def balance(self) -> Basis:
        """Scale each term's three factors by powers of two towards equal norms: the same algorithm, bit for bit."""
        logs = torch.stack([getattr(self, field).flatten(1).norm(dim=1).log2() for field in FACTORS])
        shift = (logs.mean(dim=0) - logs).round()
        shift[:, ~shift.isfinite().all(dim=0)] = 0.0  # a factor is zero, or its norm overflows: the term stays
        shift[2] = -shift[0] - shift[1]
        e, f, d = (torch.exp2(exponents)[:, None, None] for exponents in shift)
        return Basis(self.encoder * e, self.weight_encoder * f, self.decoder * d, name=self.name)

    def quantize(self, dtype: torch.dtype) -> Basis:
        """E and F rounded to `dtype` after balancing, D refitted to them by least squares and kept in float32.

        A basis whose coefficients `dtype` already holds comes back unchanged, so exact dyadic ones stay exact.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise BasisError(f"quantize takes a floating-point dtype; got {dtype}")
        if all(torch.equal(getattr(self, f), getattr(self, f).to(dtype).double()) for f in FACTORS):
            return self
        even = self.balance()
        rounded = Basis(even.encoder.to(dtype), even.weight_encoder.to(dtype), even.decoder.float(), name=self.name)
        refitted = replace(rounded, decoder=rounded.refit_decoder().decoder.float())
        return refitted if refitted.error < rounded.error else rounded

    def save(self, path: str | Path, *, provenance: dict[str, Any] | None = None) -> None:
        """Write JSON that `load` reads back exactly; the file appears whole or not at all (then a BasisError says why).

        Args:
            path: the file.
            provenance: where the factors come from, written down beside them.
        """
        record: dict[str, Any] = {"name": self.name, "tile": self.tile, "rank": self.rank, "exact": self.is_exact}
        record |= {"relative_squared_error": self.error, "kappa": self.kappa}
        record |= {field: getattr(self, field).tolist() for field in FACTORS}
        basis_record.write(record if provenance is None else {**record, "provenance": provenance}, path)

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> Basis:
        """Read a file written by `save`.

        Args:
            path: the file.
            max_bytes: the most that the file, or its factors in float64, may take.

        Raises:
            BasisError: not such a file, larger than `max_bytes`, factors of another tile or rank than stated, or not
                exact though it claims so.
        """
        return cls.from_record(basis_record.read_json(path, max_bytes), source=str(path), max_bytes=max_bytes)

    @classmethod
    def from_record(cls, record: object, *, source: str, max_bytes: int = MAX_BYTES) -> Basis:
        """The basis in a parsed JSON `record`; `source` names it in errors. Raises as `load`."""
        found: dict[str, Any] = basis_record.checked_keys(record, source)
        try:
            basis = cls(found["encoder"], found["weight_encoder"], found["decoder"], str(found.get("name", "")))
        except BasisError as error:
            raise BasisError(f"{source}: {error}") from error
        basis_record.check_size(sum(getattr(basis, field).numel() for field in FACTORS), source, max_bytes)
        basis_record.check_claims(found, basis.tile, basis.rank, basis.error, basis.kappa, basis.is_exact, source)
        return basis

    def _gram(self, field: str) -> Tensor:
        flat: Tensor = getattr(self, field).flatten(1)
        return flat @ flat.mT

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        return f"Basis({name}tile={self.tile}, rank={self.rank}, error={self.error:.4g}, kappa={self.kappa:.4g})"
