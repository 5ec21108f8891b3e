"""Decides: who is rank 3, what a failure means, when to restart, what the exit code is. No I/O, no clock; `now` is an argument."""
