"""The Triton backend: kernels, their arguments and their launch."""
