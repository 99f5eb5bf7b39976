"""Programs: the bodies of the console commands and of ``launch/*.py``."""
