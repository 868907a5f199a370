"""Fuzzes phase 1 by the million, faster than hypothesis: `make fuzz`. What it saw is in tests/data/fuzz_corpus."""
