"""How fast clips are made: this project's loader beside PyTorch DataLoaders, on the same files and cores."""
