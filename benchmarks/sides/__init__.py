"""The sides of a comparison: each a program that sends on command and reports what it took.

A side is started with one JSON argument (`Spec`), says it is ready, then obeys: each line of standard input is a
number of messages to send and to have acknowledged; the answer is one line of JSON (`Result`). cloop.c speaks the same
protocol, so that the harness can let any two of them take turns.
"""
