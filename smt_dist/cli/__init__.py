"""Run the console commands and ``launch/*.py``."""
