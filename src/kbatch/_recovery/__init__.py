"""What is done about failures, by senders and by others. Nothing here knows a queue of envelopes.

``_circuit``, ``_retry`` and ``_dead_letter`` decide, without threads, clocks or brokers. ``_gate`` stands before a
producer: it lets batches through, notes their answers, probes, and has the producer replaced that ``_handle`` keeps.
``_user_calls`` calls the functions of users, and writes the log.
"""
