"""The embedded data set: rendered videos of moving shapes."""
