"""A finished record read back, tested, and set beside others."""
