"""What `bench.py` measures this project's model against."""
