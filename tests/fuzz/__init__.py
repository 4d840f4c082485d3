"""Random legal batches on random families, against eager attention on each document alone. ``python -m tests.fuzz``."""
