"""Senders: what stands between an application that has envelopes one at a time and the producer.

``_queue`` decides, without threads, clocks or brokers; ``_agent`` does. ``_recovery`` is what they do about failures.
"""
