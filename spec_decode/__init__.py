"""Speculative decoding: drafters, verification rules, length policies; see docs/speculation.md."""
