"""The study: merge and calibration methods on real small models, with every control beside them.

Not part of the wheel. Run from the root of the repository. Data and adapters live in the user's
cache; nothing of them is committed.
"""
