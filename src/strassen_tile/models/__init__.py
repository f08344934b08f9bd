"""Models to try the operator in: T2T-ViT, published sizes and small ones."""

from strassen_tile.models.checkpoints import load_checkpoint
from strassen_tile.models.sizes import T2TConfig
from strassen_tile.models.t2t_vit import T2TViT, t2t_vit

__all__ = ["T2TConfig", "T2TViT", "load_checkpoint", "t2t_vit"]
