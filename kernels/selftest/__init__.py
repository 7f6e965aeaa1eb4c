"""The self-test of the kernels, and the cases of the ops, by which tests, tools and benchmarks call them, too."""
