"""Which sample is in which slot of a batch, and which frames of a video make a clip."""
