"""Senders: what stands between an application that has envelopes one at a time and the producer.

``_retry``, ``_circuit``, ``_queue`` and ``_dead_letter`` decide, without threads, clocks or brokers; ``_agent`` does.
"""
