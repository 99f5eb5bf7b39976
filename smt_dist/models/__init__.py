"""Models: how a base is read from disk, and how it computes its loss and its products."""
