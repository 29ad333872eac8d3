"""A trained model at work: read from a run or a file, applied to videos."""
