"""An STL layer whose products are done in fp8, for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from strassen_tile.errors import ConfigError
from strassen_tile.nn.base import TileLayer, only
from strassen_tile.nn.config import STLConfig
from strassen_tile.nn.linear import STLLinear
from strassen_tile.ops.cuda.fp8 import Rounded, fp8_linear, rounded
from strassen_tile.ops.functional import autocasts
from strassen_tile.tiling import as_samples


class STLLinearFP8(TileLayer):
    """`STLLinear` with X̂ and Ŵ in fp8 (e4m3), each channel by its own scale. For inference; on GPUs from capability 8.9.

    Buffers: `values` (r, ⌈M/s⌉, ⌈K/q⌉) in fp8, sides padded to multiples of 16, `scale` (r,), `largest` (),
    `encoder_scale` (r,) (`ops.fp8.Rounded`), `encoder`, `decoder`, `bias`.
    Half the memory of a bfloat16 layer. Its results differ by 3.7 % of their norm for random bases, as a dense product in fp8
    does, by 10.6 % for Strassen's of rank 49: as any rounding, fp8's grows with `Basis.kappa` (benchmarks/fp8_error.py).
    Rows of a tile share a scale.

    Args:
        layer: what it takes over from. Its norm, if it has one, comes along.

    Raises:
        ConfigError: a layer with an encoder for each column tile, with causal tiles, or on the meta device.
    """

    def __init__(self, layer: STLLinear) -> None:
        device = layer.encoded_weight.device
        super().__init__(layer.in_features, layer.out_features, layer.config, device)
        _check(layer.config)
        if device.type == "meta":
            raise ConfigError(
                "a weight on the meta device has no numbers to round; use STLLinearFP8.blank to load them"
            )
        self.padding, self.norm, self.token_mix = layer.padding, layer.norm, layer.token_mix
        with torch.no_grad():
            encoder, decoder = layer.factors()
            self._hold(rounded(layer.encoded_weight, encoder), encoder, decoder, layer.bias)
        self.train(layer.training)

    @classmethod
    def blank(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: STLConfig,
        dtype: torch.dtype | None = None,
    ) -> STLLinearFP8:
        """One on the meta device, for numbers that are to be loaded; `dtype` is that of encoder, decoder and bias.

        Raises:
            ConfigError: as the constructor.
        """
        _check(config)
        made = cls.__new__(cls)
        TileLayer.__init__(made, in_features, out_features, config, "meta", dtype)
        made.norm = None
        layer = STLLinear(in_features, out_features, bias, config=config, device="meta", dtype=dtype)
        with torch.no_grad():
            made._hold(rounded(layer.encoded_weight, layer.encoder), layer.encoder, layer.decoder, layer.bias)
        return made

    def _hold(self, weight: Rounded, encoder: Tensor, decoder: Tensor, bias: Tensor | None) -> None:
        for name, tensor in weight._asdict().items():
            self.register_buffer(name, tensor)
        for name, factor in (("encoder", encoder), ("decoder", decoder), ("bias", bias)):
            self.register_buffer(name, None if factor is None else factor.detach().clone())

    values: Tensor
    scale: Tensor
    largest: Tensor
    encoder_scale: Tensor
    encoder: Tensor
    decoder: Tensor

    @property
    def itemsize(self) -> int:
        """Bytes a number of the encoded operands."""
        return self.values.element_size()

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        """(…, N, K) → (…, N, M), of the dtype of x; `input` is the keyword of nn.Linear.

        Raises:
            ShapeError: other features, or a 2-D input if rows mix.
            BackendError: a gradient would be asked for, or the GPU has no fp8.
        """
        x = only(x, input)
        self.check_input(x)
        if autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        lead = x.shape[:-1]
        x = as_samples(self.mixed(x if self.norm is None else self.norm(x).to(x.dtype)))
        encoder, decoder = self.encoder.to(x.dtype), self.decoder.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = fp8_linear(x, self._rounded(), encoder, decoder, bias, self.out_features)
        return y.view(*lead, self.out_features)

    def _rounded(self) -> Rounded:
        return Rounded(self.values, self.scale, self.largest, self.encoder_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> STLLinearFP8:
        """Moved as other modules are, but fp8 and its scales keep their dtype: `model.to(dtype)` would widen them."""
        before = self._rounded()._asdict()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self


def _check(config: STLConfig) -> None:
    if config.encoder_scope != "layer" or (config.mixing == "causal" and config.mixes_in_tiles):
        raise ConfigError(
            "fp8 products take one encoder a layer (encoder_scope='layer') and no causal tiles (whose rows would see later "
            f"ones by the scale they share); got encoder_scope={config.encoder_scope!r}, mixing={config.mixing!r}"
        )
