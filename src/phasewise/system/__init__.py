"""What the operating system gives every other package: files written whole or not at all, locks, processes,
memory.

Imports the standard library alone. Any package may import it. It runs in every process.
"""
