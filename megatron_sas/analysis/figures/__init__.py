"""The figures of a report: each function returns a matplotlib figure, or None where the runs lack what it shows."""
