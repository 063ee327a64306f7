"""What predicts from the text so far: n-grams, the longest match, and the registry of further experts."""
