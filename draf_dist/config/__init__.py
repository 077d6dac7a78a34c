"""Specs and settings."""
