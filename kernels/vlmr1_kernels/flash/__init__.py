"""Implementations on variable-length flash attention of flash-attn or torch: NVIDIA GPUs, half precision."""
