"""One Protocol, one engine a file."""
