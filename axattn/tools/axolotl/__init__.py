"""axolotl's training YAML: attention settings read, checked and migrated to one ``attn_implementation``."""
