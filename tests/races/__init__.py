"""What many threads do to one producer, and to one consumer, for ThreadSanitizer: `make tsan`."""
