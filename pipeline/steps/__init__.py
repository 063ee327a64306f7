"""The steps of a seed: one on disk, what it takes up again, and which there are."""
