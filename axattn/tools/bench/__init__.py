"""Every usable kernel side by side, in one run: times, ratios, memory, error; a report, a plot, a comparison."""
