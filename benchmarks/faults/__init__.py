"""Faults made on purpose, and what a record loses to them."""
