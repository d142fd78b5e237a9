"""One merge method per file."""
