"""The forkserver: a process that has imported everything, from which flow runs are forked in milliseconds.

Starting Python and importing Prefect costs a second or more of CPU for each flow run. The forkserver pays that once: a
single-threaded process imports everything that a flow run needs, then forks a child for every run. A worker cannot fork
itself, because it runs an event loop and threads, and a fork copies only the thread that called it.

``client`` and ``pool`` run in the process that asks for forks (a worker, a local batch), ``server`` in the forkserver
and the first moments of its children, ``protocol`` in both. ``worker`` and ``local`` may import it.
"""
