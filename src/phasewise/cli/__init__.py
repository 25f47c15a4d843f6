"""The command line, and what people see in a terminal. Nothing imports it. It runs in the process of a command."""
