"""Many adapters in, one adapter out (floor 2)."""
