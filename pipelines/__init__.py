"""Turns a dataset into batches on the device: manifest, sampling, decoding, augmentation."""

SELFTEST_MODULE = f"{__name__}.dali.selftest"
"""The module to run with `python -m`: whether DALI decodes on this machine."""
