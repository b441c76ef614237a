"""What grows with the work, and how."""
