"""Looking at what a run trained on, and at what a model attends to."""
