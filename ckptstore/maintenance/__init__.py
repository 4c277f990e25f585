"""Many checkpoints: proving them and collecting what killed saves left."""
