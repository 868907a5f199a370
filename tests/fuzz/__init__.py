"""Fuzzes phase 1 by the million, faster than hypothesis: `make fuzz`. What it found is kept in tests/data/fuzz_corpus."""
