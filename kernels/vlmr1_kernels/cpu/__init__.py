"""Implementations on torch's own CPU kernels."""
