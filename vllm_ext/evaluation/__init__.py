"""Quality measurements: needle retrieval, divergence from dense attention, perplexity."""
