"""Every stage beside a plain baseline, and the machine's limits."""
