"""A plain training loop that survives crashes: when it saves, what it prints, how it resumes."""
