"""Base models whose weights are a few bits each, with low-rank factors beside them (LQ-LoRA, arXiv:2311.12023)."""
