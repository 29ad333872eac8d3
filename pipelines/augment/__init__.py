"""Augmentation: NumPy draws the random parameters, DALI operations apply them."""
