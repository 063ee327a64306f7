"""Text to bits and back, one token at a time."""
