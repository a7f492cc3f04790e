"""Several ranks: what they tell each other, how a step is shared out, and the engines that shard parameters."""
