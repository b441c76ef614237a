"""Model cards, charts and the HTML page."""
