"""SMT beside full fine-tuning, LoRA, DoRA and SHiRA at matched budgets: ``launch/compare.py``."""
