"""What to keep, as plain values: nothing here reads or writes."""
