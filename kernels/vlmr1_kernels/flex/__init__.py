"""Implementations on torch's FlexAttention, compiled, for CUDA."""
