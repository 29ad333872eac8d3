"""One HTML page about a manifest and its videos."""
