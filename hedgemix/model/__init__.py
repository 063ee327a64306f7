"""The transformer, its attention, and its layers by hand for a CPU."""
