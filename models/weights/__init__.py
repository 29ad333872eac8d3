"""Reading weights of unknown origin: what a file holds, whose names it uses, and how they fit a model."""
