"""What a run is told: the schema, the files it is written in, and the words about both."""
