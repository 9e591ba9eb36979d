"""Dependency attention in Triton: forward, backward, and the entries along edges."""
