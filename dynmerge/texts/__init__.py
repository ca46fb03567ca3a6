"""Texts: a skill's examples, from a file or from its own adapter, as what a model must predict."""
