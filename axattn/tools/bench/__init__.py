"""Benchmarks of all usable kernels in one run: times, ratios, memory, error; report, plot, comparison."""
