"""What the project promises, checked with pytest."""
