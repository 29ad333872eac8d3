"""Runs side by side: what differs in their recipes, results, data, and whether it is more than chance."""
