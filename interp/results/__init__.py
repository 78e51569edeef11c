"""Results: effects, attention statistics and attention patterns.

With their Parquet files and significance tests.
"""
