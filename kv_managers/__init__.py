"""KV-cache managers: eviction and retrieval engines (none yet)."""
