"""The command line, and what people see in a terminal.

A command is a function: in ``app`` if it starts, stops, deploys or runs something, in ``batches`` if it acts on a batch
on the server, in ``warehouse`` if it reads or changes the warehouse. Nothing imports it. It runs in the process of a
command.
"""
