"""DeepSpeed set-up, learning rate, checkpoints and the training loop."""
