"""One metric a file, and the record of them all."""
