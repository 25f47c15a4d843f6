"""The one registry of what Phasewise rebinds, or uses below its public names, in Prefect and the libraries under it.

``entries`` says what and why, ``registry`` decides whether it may be applied. ``server``, ``worker``, ``local`` and
``cli`` (``phasewise doctor``) may import it. It runs in the server, in workers and in the processes of flow runs; the
code of a patch is in the package in whose process it runs.
"""
