"""Data for training comparisons: bundled digits, IDX folders (MNIST, Fashion-MNIST) and image folders.

Importing this imports torch only; scikit-learn, Pillow and numpy when a source first needs them.
"""

from __future__ import annotations

from strassen_tile.data.augment import augmentation_text, augmented
from strassen_tile.data.images import collate
from strassen_tile.data.sources import load_images
from strassen_tile.data.splits import ImageSplits, hold_out

__all__ = ["ImageSplits", "augmentation_text", "augmented", "collate", "hold_out", "load_images"]
