"""What users would pick instead: one roster of products, and one of methods for models built on it."""

from strassen_tile.baselines.block_diagonal import MonarchLinear
from strassen_tile.baselines.layers import LowRankLinear
from strassen_tile.baselines.methods import (
    Method,
    dense,
    low_rank,
    mixed,
    monarch,
    rotated,
    sparse_24,
    stl,
    token_mix,
)
from strassen_tile.baselines.mixes import MIXES, Mix, MixedLinear
from strassen_tile.baselines.model_cost import ModelCost, model_cost
from strassen_tile.baselines.rotation import RotatedLinear
from strassen_tile.baselines.sparse24 import Sparse24Linear, mask_24

__all__ = [
    "MIXES",
    "LowRankLinear",
    "Method",
    "Mix",
    "MixedLinear",
    "ModelCost",
    "MonarchLinear",
    "RotatedLinear",
    "Sparse24Linear",
    "dense",
    "low_rank",
    "mask_24",
    "mixed",
    "model_cost",
    "monarch",
    "rotated",
    "sparse_24",
    "stl",
    "token_mix",
]
