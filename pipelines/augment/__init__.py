"""Augmentation: random parameters drawn in NumPy, DALI operations that apply them."""
