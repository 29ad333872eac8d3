"""Which process is which: what started it, and its place among the ranks."""
