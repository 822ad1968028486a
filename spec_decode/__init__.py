"""Speculative decoding: drafters, verifiers, length policies (none yet)."""
