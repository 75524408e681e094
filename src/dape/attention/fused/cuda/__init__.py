"""Kernels in CUDA with their launchers."""
