"""The operator as a layer, its configuration, its start, and its parameter groups."""

from strassen_tile.nn.config import STLConfig
from strassen_tile.nn.factors import Factored, normalise_weights, zero_last
from strassen_tile.nn.fp8 import STLLinearFP8
from strassen_tile.nn.linear import STLLinear
from strassen_tile.nn.mlp import STLMLP, Roles
from strassen_tile.nn.optim import param_groups
from strassen_tile.nn.padding import PaddingMask
from strassen_tile.nn.token_mix import TokenMix, token_mix

__all__ = [
    "STLMLP",
    "Factored",
    "PaddingMask",
    "Roles",
    "STLConfig",
    "STLLinear",
    "STLLinearFP8",
    "TokenMix",
    "normalise_weights",
    "param_groups",
    "token_mix",
    "zero_last",
]
