"""Optimizers, which parameters they decay, and schedules of the learning rate and of every weight."""
