"""Which layers of a model to replace; swap, report, undo; and whether rows mix that must not."""

from strassen_tile.convert.check import MixingReport, check_mixing
from strassen_tile.convert.quantize import quantize_fp8
from strassen_tile.convert.stl import convert
from strassen_tile.convert.swap import Conversion, swap

__all__ = ["Conversion", "MixingReport", "check_mixing", "convert", "quantize_fp8", "swap"]
