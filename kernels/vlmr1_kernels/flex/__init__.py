"""Implementations on torch's FlexAttention, compiled; CUDA."""
