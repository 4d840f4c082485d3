"""Examples: each runs on a CPU in seconds, on a model of its own making or on yours."""
