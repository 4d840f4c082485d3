"""Properties of a model class: positions, token mixers, pooling, losses, rotary embeddings. Reads only, no patches."""
