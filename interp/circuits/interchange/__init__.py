"""Interchange interventions on learned subspaces and through bijections.

Subspaces are learned by DAS.
"""
