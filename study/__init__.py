"""The study: merge and calibration methods on real small models, with every control beside them.

Not part of the wheel. Run from the root of the repository. The adapters that it measures lie in
`study/adapters`; texts and whatever is found live in the user's cache.
"""
