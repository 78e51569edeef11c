"""Scores of edges and sites by gradients, information flow, weights or at random; screening by those scores."""
