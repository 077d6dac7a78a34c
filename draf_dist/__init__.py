"""Distributed training of reliability-aware clinical models."""

__version__ = "0.1.0"
