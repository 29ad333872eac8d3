"""Compares runs: their recipes, results and data, with tests of significance."""
