"""What all layers of this kind share: which inputs they take, what padding rows mean to them, what they cost."""

from __future__ import annotations

from torch import Tensor, nn

from strassen_tile import cost
from strassen_tile.errors import ShapeError, shape_text
from strassen_tile.nn.config import STLConfig
from strassen_tile.nn.padding import PaddingMask


class TileLayer(nn.Module):
    """A layer (…, N, K) → (…, N, M) whose product is the Strassen-Tile operator.

    Attributes:
        in_features, out_features: K and M.
        config: what kind of operator.
        padding: set by `convert`: which rows of a batch are padding.
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, config: STLConfig) -> None:
        super().__init__()
        if min(in_features, out_features) < 0:
            raise ShapeError(f"features must be >= 0; got in_features={in_features}, out_features={out_features}")
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.padding: PaddingMask | None = None

    @property
    def itemsize(self) -> int:
        """Bytes a number of the encoded operands."""
        raise NotImplementedError

    def cost(self, rows: int, batch: int = 1) -> cost.Cost:
        """Cost of `batch` samples of `rows` rows."""
        tile, scope = self.config.pqs, self.config.encoder_scope
        features = self.in_features, self.out_features
        return cost.linear(
            rows, *features, tile, self.config.rank, batch=batch, itemsize=self.itemsize, encoder_scope=scope
        )

    def padding_now(self) -> Tensor | None:
        """The mask (B, N) by which padding rows must be zeroed now; causal rows see nothing behind them, padding included."""
        return self.padding.current() if self.padding is not None and self.config.mixing == "sequence" else None

    def without_padding(self, x: Tensor) -> Tensor:
        """`x` with its padding rows zeroed, where that is called for."""
        return x if self.padding is None or self.padding_now() is None else self.padding.zero(x)

    def check_input(self, x: Tensor) -> None:
        """Raise ShapeError if `x` has other features, is 2-D though the rows of a tile depend on each other, or continues a
        cached sequence in the middle of a tile.
        """
        if x.ndim and x.shape[-1] != self.in_features:  # a tile would pad what is missing
            raise ShapeError(f"x must have {self.in_features} features; got {shape_text(x.shape)}")
        if self.config.mixes_rows and x.ndim < 3:
            raise ShapeError(
                f"a 2-D input {shape_text(x.shape)} is a batch of rows, and this layer (mixing={self.config.mixing!r}, "
                f"tile {self.config.tile}) mixes the {self.config.pqs[0]} rows of a tile: samples would leak into each "
                "other. For one sequence pass x.unsqueeze(0); for independent rows use mixing='none' or keep the layer dense"
            )
        if self.config.mixes_rows and self.padding is not None:
            self.padding.check_start(self.config.pqs[0])

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, config={self.config!r}"
