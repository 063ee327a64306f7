"""The one file that a score rests on: its byte layout, its tensors, and what is in it."""
