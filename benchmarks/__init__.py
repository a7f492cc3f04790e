"""Training steps (`python -m benchmarks`), kernels (`benchmarks.ops`), and all of it on a GPU (`benchmarks.gpu`)."""
