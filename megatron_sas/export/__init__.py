"""Training checkpoints to Hugging Face directories and back, with a model card."""
