"""How good a model is: inside a run, and afterwards on any manifest."""
