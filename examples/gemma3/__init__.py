"""Gemma 3 270M, a base model of another family than SmolLM2, with another tokenizer: what slow tests transfer to."""
