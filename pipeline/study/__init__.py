"""Variants of one recipe, each a record of its own, and what they share."""
