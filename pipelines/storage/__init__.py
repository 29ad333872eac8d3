"""Reading videos by byte range: local files and object stores, with a cache on the node's disk."""
