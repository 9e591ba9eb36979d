"""What a model knows: syntactic attention (UAS) and grammatical acceptability (BLiMP), live or offline."""
