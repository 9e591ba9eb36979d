"""What corpora and packed data hold."""
