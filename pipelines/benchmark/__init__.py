"""Benchmark of this project's loader against PyTorch DataLoaders, on the same files and cores."""
