"""Planted defects: `make mutants` builds kbatch with one at a time and sees whether the suite finds it."""
