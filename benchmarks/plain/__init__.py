"""The baselines: what one would write first, or what was published, in plain torch."""
