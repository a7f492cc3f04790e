"""Files -> samples; samples -> prompts (tokens and image tensors, each image once)."""
