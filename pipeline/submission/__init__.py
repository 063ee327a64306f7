"""What is handed in, and what stands in its way."""
