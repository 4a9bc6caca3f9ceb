"""Kernels of sparqle-stream: one package per op, `reference` is the truth, `__init__` chooses."""
