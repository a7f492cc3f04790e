"""Checkpoints, resume, signals, disk space and worker processes of a run."""
