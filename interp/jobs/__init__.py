"""Resumable jobs: a run directory of parts, leases that share them, and the workers that compute them."""
