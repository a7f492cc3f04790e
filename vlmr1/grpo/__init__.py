"""The GRPO algorithm: groups, packs, policy and reference passes, loss, and the trainer that runs them."""
