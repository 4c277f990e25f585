"""What the bytes mean. SPEC.md in this folder is normative; this code obeys it."""
