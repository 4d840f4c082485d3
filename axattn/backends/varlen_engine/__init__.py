"""Attention over a `Layout`, shared by every varlen backend: packed, in CPU tiles, forward and backward apart."""
