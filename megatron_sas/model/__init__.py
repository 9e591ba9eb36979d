"""BERT with dependency attention."""
