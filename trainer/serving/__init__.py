"""HTTP around one trained model."""
