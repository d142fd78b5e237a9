"""Real adapters of a real model, with the scripts that made and scored them."""
