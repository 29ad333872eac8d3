"""The model under DeepSpeed: all that knows it, and what changes the weights."""
