"""Senders: what stands between an application that has envelopes one at a time and the producer.

``_queue`` decides, without threads, clocks or brokers. ``_send_loop`` is what the thread of an ``_agent`` does, with
``_flights`` for what is sent, ``_endings`` for what is not, and ``_watchers`` for those that wait.
"""
