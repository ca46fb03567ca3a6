"""Diagnostics: what merging a bank has to expect, from its factors and from its texts."""
