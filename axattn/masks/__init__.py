"""The mask function that Transformers calls, the lazy mask and its varlen layout. Documents: `axattn.documents`."""
