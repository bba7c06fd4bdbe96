"""What evaluations share, and what each benchmark has of its own."""
