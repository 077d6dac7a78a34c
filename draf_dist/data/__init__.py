"""Releases, their order, the loader and what is done to a batch."""
