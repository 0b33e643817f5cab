"""What a run works with: its processes, device and memory, and the options for these."""
