"""Training an adapter on pictures: one loop for all variants and families."""
