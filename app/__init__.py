"""HTTP, command line and settings. Imports no torch (floor 5)."""
