"""Q-Former attention: queries against a ring of timed entries with a learned time bias."""

from sparqle_kernels.query_attention.reference import query_attention

__all__ = ["query_attention"]
