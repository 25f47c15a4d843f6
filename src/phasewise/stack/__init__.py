"""A Prefect server and its workers on one machine: started, found, supervised, stopped.

``control`` runs in the commands, ``supervisor`` in a process of its own that loads neither Prefect nor pydantic.
``cli`` may import it.
"""
