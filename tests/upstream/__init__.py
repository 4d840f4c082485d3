"""Transformers' own test mixins, run on its attention and on `auto`, outcome by outcome: `python -m tests.upstream`."""
