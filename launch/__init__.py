"""Commands: one thin script each."""
