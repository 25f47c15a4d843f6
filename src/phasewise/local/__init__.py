"""A whole batch in one process tree, without a server: for development, tests and small jobs.

``flows`` and ``cli`` may import it. ``batch`` and ``runs`` work in the main process, ``child`` in those that are
forked for flow runs, ``engine`` in both.
"""
