"""Chunk-causal encoder attention over a ring of cached keys plus the new chunk."""

from sparqle_kernels.chunk_attention.reference import chunk_attention

__all__ = ["chunk_attention"]
