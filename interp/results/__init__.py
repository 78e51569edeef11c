"""What comes out: effects, attention statistics, attention patterns; Parquet files and significance tests."""
