"""Many adapters in, one image out (floor 2)."""
