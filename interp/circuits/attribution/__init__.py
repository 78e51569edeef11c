"""Scores of edges and sites, and screening of sites by scores.

Scores are by gradients, by information flow or at random.
"""
