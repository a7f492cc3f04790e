"""TRL's names: the GRPOConfig and GRPOTrainer that `vlmr1` exports."""
