"""Adapters for SmolLM2-135M-Instruct: base model, tasks, training and scoring."""
