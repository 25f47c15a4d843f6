"""Flow runs on a Prefect server: phases, waiting, cancelling, batches, deployments, and why a run waits.

``phases`` starts the steps of a phase, waits for them and runs a crashed one again. ``deadlock`` finds out whether a
pipeline could wait for itself, ``diagnose`` why a run waits.

Uses Prefect's public client API alone and never reaches DuckDB. ``local``, ``worker``, ``server``, ``flows`` and
``cli`` may import it. It runs in the processes of the orchestrating flows, in workers and in commands.
"""
