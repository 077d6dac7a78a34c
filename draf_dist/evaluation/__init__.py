"""Predictions, robustness sweeps, statistics, the report."""
