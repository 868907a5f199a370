"""Receiving: records become envelopes, and handlers see each of them, in order of their keys.

``_consumer`` reads (compiled); ``_lanes`` decides without threads who is handled next, ``_positions`` which offsets may
be committed; ``_listener`` is what a user runs.
"""
