"""CUDA devices: Triton kernels, what launches and tunes them, the passes made of them, and fp8 products."""
