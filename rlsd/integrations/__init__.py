"""RLSD inside other trainers: one hook file each, and nothing here is imported by the rest."""
