"""Evidence: latency interleaved with the baseline, real bytes, quality against a re-measured baseline."""
