"""Recipes: the schema, the YAML files, and the reference page."""
