"""What decoder layers look like, found out by experiment."""
