"""The preflight: checks of every node before a run."""
