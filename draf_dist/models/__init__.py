"""Encoders and fusion models."""
