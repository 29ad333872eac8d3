"""Evaluation of a model: inside a run, and afterwards on any manifest."""
