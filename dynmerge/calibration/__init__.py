"""Calibration, offline: a bank and texts -> what makes its merges better.

Nothing on the request path imports it.
"""
