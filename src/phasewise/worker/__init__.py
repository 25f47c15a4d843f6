"""The work-pool type ``warm-process``: a Prefect worker whose flow runs start in milliseconds.

``child`` and ``event_outlet`` run in the process forked for a flow run, ``warm_up`` in the forkserver, everything else
in the worker's process. With ``server`` and ``local`` one of the three packages that touch Prefect below its client
API. Only Prefect's plugin loader, the stack (as a command) and ``server`` import it.
"""
