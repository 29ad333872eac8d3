"""What a run is to a SLURM cluster."""
