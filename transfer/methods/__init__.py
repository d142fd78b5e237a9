"""Ways to move an adapter, one a file."""
