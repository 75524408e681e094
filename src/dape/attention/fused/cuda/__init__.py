"""Kernels in CUDA, each with its launcher."""
