"""Save and load adapters, checkpoints and merged models, whole or not at all.

Nothing is pickled.
"""
