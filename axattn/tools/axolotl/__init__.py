"""axolotl's training YAML: reads and checks attention settings, and migrates them to one ``attn_implementation``."""
