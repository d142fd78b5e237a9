"""One adapter in, one adapter for another base model out."""
