"""What differs from `transformers.Trainer` whatever the loss is: checkpoints, logs, resume."""
