"""The score: its order, test-time training, and where its bits went."""
