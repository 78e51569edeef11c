"""``python -m headstats.bench``."""

from headstats.bench.run import main

main()
