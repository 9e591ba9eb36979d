"""Files and datasets to units of text."""
