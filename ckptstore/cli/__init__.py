"""The command line: thin, quick to start, and the same answers for people and scripts."""
