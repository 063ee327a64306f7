"""What parts of the mixture and the export are worth, and what they take."""
