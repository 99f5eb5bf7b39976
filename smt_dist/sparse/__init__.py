"""Define blocks and models that have blocks."""
