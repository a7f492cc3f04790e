"""Supervised fine-tuning on the packs of GRPO: a row is a group whose completions are its given answers."""
