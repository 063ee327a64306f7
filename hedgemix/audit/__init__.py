"""The score of a finished run, derived again and checked."""
