"""The bank: the calibrated per-task factors of one base model."""
