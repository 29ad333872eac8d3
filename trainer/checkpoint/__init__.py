"""Checkpoints and files of weights: saving, retention, resuming, export."""
