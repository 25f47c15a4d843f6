"""From a source to staging: which tables and rows a batch reads, and what it has extracted and not yet published.

    staging/<batch>/batch.json                     which tables belong to the batch
    staging/<batch>/partitions.json                which of them are split, and into which parts
    staging/<batch>/lake.json                      what the lake had when the batch began
    staging/<batch>/<table>/<attempt>.parquet      rows; where the lake's files are on S3, they are there from the start
    staging/<batch>/<table>/manifest.json          written last; without it the folder counts for nothing
    staging/<batch>/published.json                 the snapshot that the batch became

``extract`` stages one table: ``extraction`` reads its rows into Parquet, the manifest comes last.

Never reaches Prefect. ``publishing``, ``report``, ``flows`` and ``cli`` may import it. It runs in the processes of
``pre_etl``, ``sub_etl`` and ``process_table_etl``, and for reading in ``final_etl`` and commands.
"""
