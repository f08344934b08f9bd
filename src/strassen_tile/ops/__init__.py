"""The operator, fast: registered kernels, their gradients, and the functions users call."""

from strassen_tile.ops.functional import register_backend, stl_linear, stl_matmul

__all__ = ["register_backend", "stl_linear", "stl_matmul"]
