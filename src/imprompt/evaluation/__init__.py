"""Measure an adapter: sets, protocols, metric encoders, metrics, and runs that can be resumed."""
