"""Deliveries, retraining, the gate and the model registry."""
