"""The version, where both the build and the package can read it without importing torch."""

__version__ = "0.1.0"
