"""Flat records, written atomically, with the environment that made them: below everything that writes."""

from strassen_tile.records.environment import ENVIRONMENT_FIELDS, environment, environment_of
from strassen_tile.records.rows import Row, Value, append_rows, read_rows, write_rows

__all__ = [
    "ENVIRONMENT_FIELDS",
    "Row",
    "Value",
    "append_rows",
    "environment",
    "environment_of",
    "read_rows",
    "write_rows",
]
