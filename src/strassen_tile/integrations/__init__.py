"""Glue to other libraries; `import strassen_tile` imports none of them."""
