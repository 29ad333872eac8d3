"""Which sample stands where in a batch, and which frames of a video make a clip."""
