"""Speed measurements: decode through a real engine, and kernels alone."""
