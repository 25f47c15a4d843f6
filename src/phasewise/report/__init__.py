"""The report of a batch: one self-contained HTML file, and its data as JSON next to it.

``from_batch`` makes its records of what both planes know; the rest knows neither Prefect nor DuckDB. ``timing`` finds
out what ran when, ``timeline`` and ``charts`` draw it, ``page`` lays it out.

``flows`` and ``cli`` may import it. It runs in the process of ``final_etl``, and in commands that show a run.
"""
