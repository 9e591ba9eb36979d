"""What a run leaves in its directory, and what watches it: checkpoints, records, requests to stop, sensors."""
