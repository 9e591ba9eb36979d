"""Pages to look at a model's attention with."""
