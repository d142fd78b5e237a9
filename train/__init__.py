"""Data in, one adapter out: methods of training, the loop that runs them, and the menu of both."""
