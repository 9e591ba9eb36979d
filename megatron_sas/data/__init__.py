"""Text → sentences with dependency heads → WordPieces → packed sequences on disk → masked batches."""
