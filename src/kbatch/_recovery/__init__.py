"""What is done about failures, by senders and by others. Nothing here knows a queue of envelopes.

``_circuit``, ``_retry`` and ``_dead_letter`` decide, without threads, clocks or brokers. ``_handle`` has the producer
that senders share.
"""
