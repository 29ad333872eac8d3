"""What a run needs to go on: written beside the old one, visible only when whole, whoever reads it."""
