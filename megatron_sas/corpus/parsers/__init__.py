"""Parsers: units of text to words with dependency heads."""
