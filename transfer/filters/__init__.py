"""Which generated inputs are kept."""
