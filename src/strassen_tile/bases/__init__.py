"""Where bases come from: exact algorithms, best approximations, random starts, group algebras, published files."""

from strassen_tile.bases.approximate import approximate, shipped, truncated
from strassen_tile.bases.exact import naive, strassen
from strassen_tile.bases.files import load, save
from strassen_tile.bases.groups import group
from strassen_tile.bases.names import known, named
from strassen_tile.bases.random import random

__all__ = [
    "approximate",
    "group",
    "known",
    "load",
    "naive",
    "named",
    "random",
    "save",
    "shipped",
    "strassen",
    "truncated",
]
