"""What a layer costs: FLOPs, bytes and parameters counted, and seconds predicted from a machine's measured rates."""

from strassen_tile.cost.counts import Cost, dense, linear, with_mix
from strassen_tile.cost.rates import Machine, machine, measure

__all__ = ["Cost", "Machine", "dense", "linear", "machine", "measure", "with_mix"]
