"""Turns a dataset into batches on the device: manifest, sampling plan, decoding, augmentation."""


class DataError(Exception):
    """Something about the data that its owner can mend; the message says what, where and how."""


class VideoDefect(DataError):
    """One video cannot be used; the message says why, in words that follow the file's name."""
