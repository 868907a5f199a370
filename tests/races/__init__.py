"""What many threads do to one producer, for ThreadSanitizer: `make tsan`."""
