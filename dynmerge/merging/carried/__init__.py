"""What a bank carries besides factors: how a preference becomes coefficients (maps), what they
multiply (granularity), and both met with a bank (merges)."""
