"""A whole batch in one process tree, without a server: for development, tests and small jobs.

``flows`` and ``cli`` may import it. ``runs`` starts and ends flow runs and works in the main process. ``engine`` calls
flows and tasks in the place of Prefect's engine, in that process and in those forked for the runs.
"""
