"""Implementations on the variable-length flash kernels of torch or flash-attn; NVIDIA GPUs, half precision."""
