"""The DALI pipelines: external sources, their worker processes, and the graph."""
