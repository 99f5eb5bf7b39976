"""Turn rows of a file into token sequences and batches."""
