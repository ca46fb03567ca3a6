"""What an experiment's log says: comparisons that may be looked at every day, and their report."""
