"""Scores of edges and sites, by gradients, by information flow or at random; screening of sites by scores."""
