"""MLflow, behind a spool on disk: a run neither waits for it nor stops without it."""
