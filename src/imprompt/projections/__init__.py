"""Projections of image features to image tokens."""
