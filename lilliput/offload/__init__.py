"""Device or edge server: policies, learned routers, links, and how they are fitted and judged."""
