"""Runs on a SLURM cluster: submission, attempts, preflight, status."""
