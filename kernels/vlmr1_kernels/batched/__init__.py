"""Implementations on torch's scaled_dot_product_attention over batches of sequences of equal length."""
