"""Strassen-Tile: a learnable bilinear operator with fewer FLOPs in place of matrix multiplication, for PyTorch."""

from strassen_tile import bases, cost, models, reference
from strassen_tile._version import __version__
from strassen_tile.amm import Approximation, amm
from strassen_tile.basis import Basis
from strassen_tile.convert import (
    Conversion,
    MixingReport,
    check_mixing,
    convert,
    load_model,
    quantize_fp8,
    save_model,
)
from strassen_tile.integrations import register
from strassen_tile.integrations.export import export
from strassen_tile.integrations.mlps import Fusion, fuse_mlps
from strassen_tile.nn import STLMLP, PaddingMask, Roles, STLConfig, STLLinear, STLLinearFP8, param_groups
from strassen_tile.nn.base import padding
from strassen_tile.ops import register_backend, stl_linear, stl_matmul

# The fast path and its oracle do not know each other; they meet here.
register_backend("reference", lambda x, w, e, d, bias, m: reference.stl_linear(x, w, e, d, bias, out_features=m))
register()

__all__ = [
    "STLMLP",
    "Approximation",
    "Basis",
    "Conversion",
    "Fusion",
    "MixingReport",
    "PaddingMask",
    "Roles",
    "STLConfig",
    "STLLinear",
    "STLLinearFP8",
    "__version__",
    "amm",
    "bases",
    "check_mixing",
    "convert",
    "cost",
    "export",
    "fuse_mlps",
    "load_model",
    "models",
    "padding",
    "param_groups",
    "quantize_fp8",
    "save_model",
    "stl_linear",
    "stl_matmul",
]
