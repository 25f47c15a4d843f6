"""From staging to readers: audit a batch, publish it as one snapshot or not at all, roll back, maintain, clean up.

Never reaches Prefect. ``report``, ``flows``, ``testing`` and ``cli`` may import it. It runs in the processes of
``final_etl``, of the cleanups and of commands.
"""
