"""The machine and the source tree that a run is on."""
