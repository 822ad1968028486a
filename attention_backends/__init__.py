"""Sparse attention: one backend, one engine, one file a method."""
