"""Values that everything shares: names, `Capability` and `Need`, options. Pure: neither torch nor Transformers."""
