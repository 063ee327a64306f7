"""Baselines as one would write them first: correct and idiomatic, for fast paths to be measured against."""
