"""train_gpt.py: a seed without a cluster, in one file."""
