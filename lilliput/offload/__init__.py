"""Routing between device and edge server: policies, learned routers, links, their fit and evaluation."""
