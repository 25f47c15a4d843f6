"""A whole batch in one process tree, without a server: for development, tests and small jobs.

``flows`` and ``cli`` may import it. ``runs`` works in the main process, ``engine`` in that one and in those forked for
the runs.
"""
