"""What the operating system gives every other package: files written whole or not at all, processes, memory.

Imports the standard library and ``phasewise.errors`` alone. Any package may import it. It runs in every process.
"""
