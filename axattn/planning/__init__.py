"""Which kernel each layer gets and why not the others. Pure: no model is changed (`axattn.patches`), nothing runs."""
