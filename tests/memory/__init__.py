"""Each allocation fails once, in turn: kbatch's own (a debug build counts them) and Python's. `make memory`."""
