"""What a transcript is told to be."""

NAMES = ("mRNA", "lncRNA")
"""The classes 0 and 1."""
