"""Document boundaries of packed rows: the input hook that finds them, eager and traced, and the packing collator.

`axattn.masks` makes masks from them; how a model class treats positions is in `axattn.traits`.
"""
