"""Building a run, the training loop and its collaborators."""
