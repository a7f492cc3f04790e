"""Collectives, launch, load balance and sharded parameters."""
