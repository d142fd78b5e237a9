"""What an adapter is: the Adapter value, LoRA algebra, file formats and the identity of base models (floor 1)."""
