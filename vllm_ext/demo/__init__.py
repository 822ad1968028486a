"""`vllm-ext demo`: the same questions to a real server with Quest and without plugins."""
