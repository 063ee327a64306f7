"""What hedgemix takes, measured beside plain baselines; run from the repository, not installed."""
