"""Consilium: federated fine-tuning of vision foundation models for hospitals."""
__version__ = "0.1.0"
