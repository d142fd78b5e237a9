"""An adapter moves from SmolLM2-135M to Gemma 3 270M: the task, the runs and their measurement."""
