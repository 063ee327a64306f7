"""hedgemix on one GPU, in two calls of a few minutes: `python -m benchmarks.gpu --help`; docs/gpu.md."""
