"""Interchange interventions on learned subspaces (DAS) and through learned bijections."""
