"""Verifies a GPU machine and measures its speed: decoding, training, resuming, memory.

`steps` lists the steps, `runner` runs each in its own process, `report` writes the results.
"""
