"""One checkpoint: blocks through the pipeline, the commit register, and back."""
