"""Plugins for other frameworks, one file each. A framework imports its plugin; axattn imports neither."""
