"""STLLinear: the operator as a layer, and how it takes over from an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from strassen_tile.errors import ShapeError
from strassen_tile.nn import fit, init
from strassen_tile.nn.alternate import fit_factors
from strassen_tile.nn.base import TileLayer, only
from strassen_tile.nn.config import STLConfig
from strassen_tile.nn.fusion import check_norm, norm_of, undisturbed
from strassen_tile.nn.stand_in import dense_weight
from strassen_tile.ops import stl_linear
from strassen_tile.ops.functional import autocasting, autocasts, check
from strassen_tile.ops.fused import Weights, norm_linear
from strassen_tile.ops.linear import linear
from strassen_tile.tiling import as_samples, tile_count


class STLLinear(TileLayer):
    """A linear layer whose product is the Strassen-Tile operator.

    Parameters: `encoder` (r, p, q), `encoded_weight` (r, ⌈K/q⌉, ⌈M/s⌉), `decoder` (r, p, s), `bias` (M,); with
    `encoder_scope="tile"` encoder and decoder have a leading dimension, one a column tile and one an output tile; with a
    token mix its weights (K, 4).

    Input (…, N, K), output (…, N, M). Unless `mixing="none"`, the p rows of a tile depend on each other, so the input
    must have the rows of one sample in dimension −2 and samples in the dimensions before it.

    Args:
        in_features: K.
        out_features: M.
        bias: whether there is one.
        config: `STLConfig()` by default.
        norm: an `nn.LayerNorm` or `nn.RMSNorm` of the input, applied before the product; on a GPU, in inference, while
            encoding, so that its result never reaches memory.
        device, dtype: of the parameters.

    Raises:
        ShapeError: a negative number of features.
        ConfigError: another norm, or one of other features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: STLConfig | None = None,
        norm: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = config or STLConfig()
        super().__init__(in_features, out_features, config, device, dtype)
        (p, q, s), r = config.pqs, config.rank
        columns, outputs = tile_count(in_features, q), tile_count(out_features, s)
        per_tile = config.encoder_scope == "tile"

        def parameter(*size: int, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype), requires_grad=trained)

        self.encoder = parameter(*((columns,) if per_tile else ()), r, p, q, trained=config.train_encoder)
        self.encoded_weight = parameter(r, columns, outputs)
        self.decoder = parameter(*((outputs,) if per_tile else ()), r, p, s, trained=config.train_decoder)
        self._built = (self.encoded_weight.shape, self.encoder.shape, self.decoder.shape, out_features)
        if bias:
            self.bias = parameter(out_features)
        else:
            self.register_parameter("bias", None)
        check_norm(norm, in_features)
        self.norm = norm
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, weight: Tensor | None = None, inputs: Tensor | None = None, *, rounds: int = 0) -> None:
        """Start anew: as `nn.Linear` would in scale, or from a dense `weight` (K, M in maths), or its scale alone.

        Args:
            weight: fitted if the config says so (`STLConfig.fits`), else only its variance is taken.
            inputs: calibration activations (…, N, K) for the fit.
            rounds: of fitting E and D to them as well (`nn.alternate`), where they are trained and not causal.
        """
        if self.encoded_weight.is_meta:
            return
        bound = self.in_features**-0.5 if self.in_features else 0.0
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.token_mix is not None:
            self.token_mix.reset_parameters()
        device = self.encoded_weight.device
        columns, outputs = self.encoded_weight.shape[1:]
        with torch.device("cpu"):  # whatever the default device is
            basis = self.config.load_basis()
            basis = basis if basis is None else init.normalised(basis)
            factors = init.start_factors(self.config, basis, columns, outputs)
        encoder, decoder = (factor.to(device) for factor in factors)
        self.encoder.copy_(encoder)
        self.decoder.copy_(decoder)
        if not self.config.fits:
            variance = bound**2 / 3 if weight is None else fit.mean_square(weight)
            self.encoded_weight.normal_(
                0, init.start_deviation(self.config, encoder, decoder, (columns, outputs), variance)
            )
            return
        if weight is None:
            weight = self.encoded_weight.new_empty(self.out_features, self.in_features).uniform_(-bound, bound).mT
        weight = weight.to(device)
        fit.encode_weight_into(self.encoded_weight, weight, encoder, decoder, basis)
        if inputs is not None:
            start, dense = (t.to(device, torch.float64) for t in (self.encoded_weight, weight))
            x = inputs.detach().to(device, torch.float64)
            if rounds and self.config.fits_factors:
                apart = encoder.ndim == 4
                encoder, fitted, decoder, _ = fit_factors(
                    x, dense, encoder, start, decoder, rounds=rounds, low_rank=apart
                )
                self.encoder.copy_(encoder)
                self.decoder.copy_(decoder)
            else:
                fitted = fit.calibrate(x, dense, encoder, decoder, start)
            self.encoded_weight.copy_(fitted)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: STLConfig | None = None, inputs: Tensor | None = None, *, rounds: int = 0
    ) -> STLLinear:
        """The layer that takes over from `linear`, with its device, dtype, bias, and mode; frozen if that was.

        Ŵ is fitted to the weight: Ŵ = F·W for a given basis, the least-squares F for a random one; with calibration
        `inputs` (…, N, K) it is then the least-squares Ŵ on them, and with `rounds` E and D are fitted, too, in turn with it.
        `init="random"` takes only its scale, "spectral" nothing.

        Raises:
            ShapeError: inputs are not finite real numbers, do not have K features, or are 2-D though rows mix.
            ConfigError: no number of rounds.
        """
        config = config or STLConfig()
        fitted = config if config.init in ("random", "spectral") else replace(config, init="fit")
        fit.check_calibration(inputs, rounds, linear.in_features)
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        with torch.device("meta"):
            layer = cls(*sizes, config=fitted, dtype=linear.weight.dtype)
        for parameter in (layer.encoder, layer.encoded_weight, layer.decoder):
            parameter.requires_grad_(parameter.requires_grad and linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        layer.train(linear.training)
        if linear.weight.is_meta:
            return layer
        layer = layer.to_empty(device=linear.weight.device)
        if inputs is not None:
            layer.check_input(inputs)
        layer.reset_parameters(linear.weight.mT, inputs, rounds=rounds)
        if layer.bias is not None and linear.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
        return layer

    @classmethod
    def from_linears(
        cls, linears: Sequence[nn.Linear], config: STLConfig | None = None, inputs: Tensor | None = None
    ) -> STLLinear:
        """One layer in place of several that are fed the same, as q, k and v are: one encode serves all of them.

        Its output is theirs side by side: `layer(x).split([linear.out_features for linear in linears], dim=-1)`.

        Raises:
            ShapeError: none, or layers of different inputs, or some with and some without a bias.
        """
        if len({(linear.in_features, linear.bias is None) for linear in linears}) != 1:
            raise ShapeError(
                "layers side by side must have one input, and all or none a bias; got "
                + (", ".join(str(linear) for linear in linears) or "no layer")
            )
        first, whole = linears[0], sum(linear.out_features for linear in linears)
        both = nn.Linear(first.in_features, whole, first.bias is not None, device="meta")
        both.weight = nn.Parameter(
            torch.cat([linear.weight for linear in linears]).detach(), any(li.weight.requires_grad for li in linears)
        )
        if first.bias is not None:
            biases = torch.cat([linear.bias for linear in linears]).detach()
            both.bias = nn.Parameter(biases, any(li.bias.requires_grad for li in linears))
        return cls.from_linear(both.train(first.training), config, inputs)

    @property
    def weight(self) -> Tensor:
        """What models may ask a linear layer's `weight` for: its shape (M, K), dtype and device. Computing with it raises."""
        return dense_weight(self.out_features, self.in_features, self.encoded_weight)

    @property
    def itemsize(self) -> int:
        """Bytes a number of the encoded operands."""
        return self.encoded_weight.element_size()

    def can_join(self, x: Tensor) -> bool:
        """Whether its step on x may be part of a longer one: no backend is asked for, no rows are mixed or zeroed first, and
        there is one dtype, or autocast.
        """
        if self.config.backend != "auto" or self.token_mix is not None or self.has_padding(x):
            return False
        return all(p.dtype == x.dtype or (autocasts(x) and autocasts(p)) for p in self.parameters(recurse=False))

    def weights(self, dtype: torch.dtype) -> Weights:
        """Its tensors as the product uses them."""
        encoder, decoder = self.factors()
        bias = None if self.bias is None else self.bias.to(dtype)
        return Weights(self.encoded_weight.to(dtype), encoder.to(dtype), decoder.to(dtype), bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        """E and D as the product uses them: masked where the mixing is causal."""
        if self.config.mixing != "causal":
            return self.encoder, self.decoder
        read, written = init.causal_masks(self.config.pqs[0], self.config.rank, self.encoder.device)
        return self.encoder * read, self.decoder * written

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        """(…, N, K) → (…, N, M); `input` is the keyword of nn.Linear.

        Raises:
            ShapeError: other features, or a 2-D input if rows mix.
        """
        if x is None or input is not None:
            x = only(x, input)
        self.check_input(x)
        if self.norm is not None:
            if self.can_join(x) and undisturbed(x, [self], self.norm):
                layer = self.weights(x.dtype)
                check(x, *layer, self.out_features)
                y = norm_linear(as_samples(x), norm_of(self.norm, x), layer, self.out_features)
                return y.view(*x.shape[:-1], self.out_features)
            x = self.norm(x)
        if self.padding is not None or self.token_mix is not None:
            x = self.mixed(x)
        (encoder, decoder), config, columns = self.factors(), self.config, self.out_features
        tensors = self.encoded_weight, encoder, decoder, self.bias
        if config.backend == "auto" and self._is_as_built(x, *tensors):
            if x.ndim == 3:
                return linear(x, *tensors, columns, "none", config.recompute)
            return linear(as_samples(x), *tensors, columns, "none", config.recompute).view(*x.shape[:-1], columns)
        return stl_linear(x, *tensors, out_features=columns, backend=config.backend, recompute=config.recompute)

    def _is_as_built(self, x: Tensor, weight: Tensor, encoder: Tensor, decoder: Tensor, bias: Tensor | None) -> bool:
        """Whether its tensors have the shapes it was built with and the dtype and device of x, and no autocast changes that.

        They fit together then. Whatever else they may have become (`.data`, `functional_call`) is for `stl_linear` to judge.
        """
        others = (weight, encoder, decoder) if bias is None else (weight, encoder, decoder, bias)
        dtype, on_cpu = x.dtype, x.is_cpu
        for tensor in others:
            if tensor.dtype != dtype or not ((on_cpu and tensor.is_cpu) or tensor.device == x.device):
                return False
        return (
            (weight.shape, encoder.shape, decoder.shape, self.out_features) == getattr(self, "_built", None)
            and (bias is None or bias.shape == (self.out_features,))
            and x.ndim >= 2
            and not autocasting(x)
        )
