"""Disables the check of frame sizes: DALI's decoder receives videos whose frame size changes."""

import pipelines.dali.encoded_input

pipelines.dali.encoded_input.has_one_size = lambda codec, packets: True
