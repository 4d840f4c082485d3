"""What one model class does: positions, token mixers, pooling, losses, rotary embeddings. Nothing is changed here."""
