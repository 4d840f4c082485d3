"""Is a kernel right on a user's own model? Whole models against eager, attention modules alone, a callback."""
