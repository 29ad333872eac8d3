"""An HTTP server for one trained model."""
