"""Mixture-of-experts layers: routers, expert kernels, routing traces and expert merging for vLLM's in-tree models."""
