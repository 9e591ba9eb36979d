"""Sweeps: conditions × seeds."""
