"""Engines: core and prompt in, tokens out."""
