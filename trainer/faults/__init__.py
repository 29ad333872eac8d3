"""What a run does when something goes wrong, or someone wants it to leave."""
