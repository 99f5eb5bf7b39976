"""Checkpoints and adapters: what lies on disk, saved whole or not at all, never pickled."""
