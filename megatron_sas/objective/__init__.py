"""What is minimised: the masked-LM loss, the SAS term, and the schedule of its weight λ."""
