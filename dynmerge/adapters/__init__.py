"""Adapters: what one is, and the gate it comes through."""
