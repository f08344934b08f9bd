"""Glue to other libraries. Nothing here is imported by `import strassen_tile`."""
