"""Where things are kept: SQL tables, content-addressed blobs and repositories (floor 1, no torch)."""
