"""Resumable jobs: a run directory of parts, leases that share them, workers and executors that compute them."""
