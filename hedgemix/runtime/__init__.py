"""What every part of a run stands on: whole files, clocks, checkpoints, process groups."""
