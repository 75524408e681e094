"""Fused kernels: forward, backward and decoding that never store a score matrix."""
