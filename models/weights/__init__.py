"""Weights from files: safe reading, published naming schemes, and loading into a model."""
