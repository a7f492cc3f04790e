"""The CPU library of kernels/csrc, built by CMake: its own GEMMs, with the loss between them."""
