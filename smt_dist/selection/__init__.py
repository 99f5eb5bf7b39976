"""Score a model's blocks on batches and select the blocks to train."""
