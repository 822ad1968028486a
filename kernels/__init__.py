"""Triton kernels, each beside its plain-PyTorch reference. Knows torch and triton only, never vLLM."""
