"""MLflow: records are written to an outbox on disk and uploaded in the background."""
