"""The compiled CPU backend: C++ sources, their build, and calls of the library."""
