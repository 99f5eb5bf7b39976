"""Data: rows of a file become token sequences and batches."""
