"""One script per claim of speed. A package of its own: some wheel on the path may bring a folder of this name."""
