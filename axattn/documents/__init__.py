"""Document boundaries of packed rows: found in a forward's inputs by its input hook, eager and traced; the collator.

Masks are made of them in `axattn.masks`; what a model class does with positions is in `axattn.traits`.
"""
