"""KV-cache managers: eviction that frees blocks; one engine, one file a method."""
