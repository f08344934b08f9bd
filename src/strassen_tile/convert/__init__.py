"""A model's linear layers replaced: select which, replace them, attach the padding mask; report, undo, check what rows see."""

from strassen_tile.convert.check import MixingReport, check_mixing
from strassen_tile.convert.perturb import Mixing
from strassen_tile.convert.replace import replace_modules
from strassen_tile.convert.saving import load_model, save_model
from strassen_tile.convert.select import Filter
from strassen_tile.convert.stl import convert, quantize_fp8
from strassen_tile.convert.swap import Conversion, Replace, swap

__all__ = ["Conversion", "Filter", "Mixing", "MixingReport", "Replace", "check_mixing", "convert", "load_model",
           "quantize_fp8", "replace_modules", "save_model", "swap"]  # fmt: skip
