"""Bits for each weight under a budget of bytes."""
