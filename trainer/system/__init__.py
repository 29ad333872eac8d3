"""Files, processes, devices and other parts of the system, for all of `trainer`."""
