"""The answer cache: semantic lookup, its similarity threshold, and a measurement of its savings."""
