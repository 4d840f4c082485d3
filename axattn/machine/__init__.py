"""What a machine has: GPUs, libraries, the hub's cache. No kernel is chosen here (`axattn.planning`)."""
