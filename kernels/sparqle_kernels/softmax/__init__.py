"""Softmax over keys that come tile by tile: Triton functions that the attention kernels share."""
