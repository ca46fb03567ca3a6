"""Evaluation: how often merged models are right, with intervals, fronts and figures."""
