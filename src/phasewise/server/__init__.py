"""The Prefect server of the embedded stack, on SQLite. All of it runs in the server's process.

With ``worker`` and ``local`` one of the three packages that touch Prefect below its client API. Nothing imports it: the
stack starts it as a command.
"""
