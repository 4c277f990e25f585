"""Checkpoints of other programs, taken into a store without running anything that is in them."""
