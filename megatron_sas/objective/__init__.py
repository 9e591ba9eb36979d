"""What is minimised: the masked-LM loss and the terms added to it."""
