"""The doors: one thin script per job."""
