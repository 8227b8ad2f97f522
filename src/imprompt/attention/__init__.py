"""Attention with image tokens: conditioning, injection and kernels."""
