"""What Ray costs."""
