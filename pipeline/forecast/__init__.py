"""What a record should take, computed before it runs: bytes of its files, seconds of its stages on GPUs."""
