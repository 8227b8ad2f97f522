"""Adapted model -> images."""
