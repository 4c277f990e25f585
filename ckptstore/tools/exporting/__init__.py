"""What ``tools.export`` is made of: one module for each kind of file, and what they share."""
