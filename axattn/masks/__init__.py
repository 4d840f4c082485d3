"""The mask function that Transformers calls, the lazy mask, its varlen layout. Documents are of `axattn.documents`."""
