"""Verifies a kernel on a user's model: whole models against eager, single attention modules, a Trainer callback."""
