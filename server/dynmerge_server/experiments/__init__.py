"""A/B experiments over preferences: who gets which arm, what came of it, and what that says."""
