"""Everything that talks to Ray's scheduler."""
