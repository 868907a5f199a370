"""Senders: what stands between an application that has envelopes one at a time and the producer."""
