"""What is validated and built before the first step."""
