"""The report of a batch: one self-contained HTML file, and its data as JSON next to it.

``finish`` is what ``final_etl`` does: audit, publish, report. ``from_batch`` makes records of what both planes know;
the rest knows neither Prefect nor DuckDB. ``timing`` finds out what ran when, ``timeline`` and ``charts`` lay it out,
``page`` draws it with ``templates``.

``flows`` and ``cli`` may import it. It runs in the process of ``final_etl``, and in commands that show a run.
"""
