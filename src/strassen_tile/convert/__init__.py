"""Which layers of a model to replace; swap, report, undo."""

from strassen_tile.convert.quantize import quantize_fp8
from strassen_tile.convert.swap import Conversion, convert, swap

__all__ = ["Conversion", "convert", "quantize_fp8", "swap"]
