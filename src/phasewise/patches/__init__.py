"""The one registry of what Phasewise rebinds, or uses below its public names, in Prefect and the libraries under it.

``entries`` says what and why, ``registry`` decides whether it may be. The code itself is where it runs: ``server``,
``worker`` and ``local`` import this package, and ``phasewise doctor`` shows it. Needs the settings alone.
"""
