"""Triton kernels for NVIDIA GPUs, imported when a CUDA tensor first needs them."""
