"""Selection: batches become scores of blocks, scores become the blocks to train."""
