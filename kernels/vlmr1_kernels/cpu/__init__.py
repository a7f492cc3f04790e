"""Implementations on torch's CPU flash attention."""
