"""The warehouse: DuckDB sessions, the DuckLake with its catalog and files, what was published, and SQL over it.

Users read "warehouse"; the code says "lake". Never reaches Prefect. ``sources``, ``staging``, ``publishing`` and
what is above may import it. It runs in the processes of flow runs and commands, and loads extensions
in the forkserver.
"""
