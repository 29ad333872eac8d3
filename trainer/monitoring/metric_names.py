"""Groups of a run's metrics in MLflow.

MLflow's pages have a section for each group, and sort sections and the charts in them by name. So accuracy
and loss come first (`best/`, `train/`, `val/`), and the names of all other groups come behind these.
"""

BEST = "best/"
"""Of the most accurate evaluation so far."""

TRAIN = "train/"
"""Of one optimiser step."""

LOSS_STEPS = 100
"""Optimiser steps that a mean of the training loss is over, at most."""

LOSS_MEAN = f"{TRAIN}loss_mean"
"""Mean training loss of the last `LOSS_STEPS` steps, those of this start; steps whose loss is not finite are
left out."""

VAL = "val/"
"""Of one evaluation."""

VIDEOS = "videos/"
"""What the training has seen: epochs, clips that could not be read, videos in quarantine."""

WALL_CLOCK = "wall_clock/"
"""How fast it goes, and where the time goes."""

WHOLE_RUN = "whole_run/"
"""Results of a finished run: the numbers of `summary.json`."""

SYSTEM = "system/"
"""Memory and load of the machines. MLflow shows this group on a page of its own, over time."""
