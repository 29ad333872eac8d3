"""The tables of the paper beside what this program computes: costs of models, and ablations."""
