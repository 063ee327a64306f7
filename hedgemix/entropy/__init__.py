"""Integers to bytes and back: the entropy coder and what it codes; numpy only."""
