"""The pipeline: one command that takes every seed through hedgemix on Ray and writes one results table."""
