"""Seconds and peak memory by phase, and NVML readings."""
