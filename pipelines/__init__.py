"""Turns a dataset into batches on the device: manifest, sampling, decoding, augmentation."""

SELFTEST_MODULE = f"{__name__}.dali.selftest"
"""A module for `python -m`: tests whether DALI decodes on this machine."""
