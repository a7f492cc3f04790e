"""Implementations in Triton, for CUDA from sm_80; on CPU only in Triton's interpreter (TRITON_INTERPRET=1)."""
