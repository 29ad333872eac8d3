"""Video decoding: demuxing, stream headers, PyAV, and the DALI nodes for decoded frames."""
