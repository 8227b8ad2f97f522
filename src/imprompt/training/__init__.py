"""Training of adapters on pictures: one loop for all variants and families."""
