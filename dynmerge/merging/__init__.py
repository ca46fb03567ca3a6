"""Merging: preference and bank in, core out. Tensors only."""
