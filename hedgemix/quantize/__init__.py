"""Weights to integers: where the bits go and how they round."""
