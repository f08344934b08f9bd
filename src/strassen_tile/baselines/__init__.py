"""What users would pick instead: one roster of products, and one of methods for models built on it."""

from strassen_tile.baselines.layers import LowRankLinear, TokenMixLinear
from strassen_tile.baselines.methods import Method, ModelCost, dense, low_rank, model_cost, sparse_24, stl, token_mix
from strassen_tile.baselines.sparse24 import Sparse24Linear, mask_24

__all__ = [
    "LowRankLinear",
    "Method",
    "ModelCost",
    "Sparse24Linear",
    "TokenMixLinear",
    "dense",
    "low_rank",
    "mask_24",
    "model_cost",
    "sparse_24",
    "stl",
    "token_mix",
]
