"""Checks and preparation before the first step."""
