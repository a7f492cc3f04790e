"""Differences from `transformers.Trainer` that do not depend on the loss: checkpoints, logs, resume."""
