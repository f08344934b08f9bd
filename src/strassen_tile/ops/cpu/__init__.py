"""The CPU: whole passes in panels of tile rows, on kernels compiled from C."""
