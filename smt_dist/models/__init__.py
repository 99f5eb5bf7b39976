"""Load base models, and change how they compute losses and matrix products."""
