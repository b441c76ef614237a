"""Recipes: facts of public tables turned into questions, and the corpus built from them."""
