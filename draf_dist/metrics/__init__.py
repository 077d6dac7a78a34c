"""Metrics, each a pure function of arrays."""
