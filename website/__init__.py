"""The site: what `make site` adds to docs/."""
