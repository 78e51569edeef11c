"""Recipes: one module each; `registry` describes them in one table, `sweep_loop` holds the loop they share."""
