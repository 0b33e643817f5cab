"""What a run works with: its device and memory, and the options for these."""
