"""Implementations that batch neighbouring sequences of equal length for torch's scaled_dot_product_attention."""
