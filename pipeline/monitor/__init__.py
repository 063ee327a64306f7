"""What is known of a record while it runs."""
