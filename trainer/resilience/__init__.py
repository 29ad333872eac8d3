"""What a run does about other runs, and about what a killed run left behind."""
