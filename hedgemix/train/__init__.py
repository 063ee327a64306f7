"""One rank's training under a budget."""
