"""Benchmarks of kbatch against a C loop, confluent-kafka and aiokafka. See README.md; run with `make bench`."""
