"""Names, `Capability` and `Need`, options: pure values, without torch or Transformers."""
