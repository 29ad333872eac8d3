"""Inspection of training batches and explanations of predictions."""
