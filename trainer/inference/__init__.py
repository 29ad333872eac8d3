"""Inference: a trained model from a run or a file, applied to videos."""
