"""Write the files of the shop into exports/, the same ones each time: ``python make_data.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

import duckdb

CUSTOMERS = """
select i as id, 'Customer ' || i as name, (date '2024-01-01' + to_days((i * 37 % 700)::int))::date as since,
    ['Bern', 'Graz', 'Lyon', 'Oslo', 'Porto'][i % 5 + 1] as city
from range(1, 201) as t (i)
"""
# A SKU with leading zeros: it stays text.
PRODUCTS = """
select printf('%05d', i) as sku, 'Product ' || i as name, ['books', 'games', 'tools'][i % 3 + 1] as category,
    (i * 731 % 9000 + 99) / 100 as price
from range(1, 41) as t (i)
"""
# Every 250th order is of a product that nobody knows, every 300th of a quantity that cannot be.
ORDERS = """
select i as id, i * 7919 % 200 + 1 as customer,
    case when i % 250 = 0 then '99999' else printf('%05d', i * 104729 % 40 + 1) end as sku,
    case when i % 300 = 0 then -1 else i % 4 + 1 end as quantity,
    (date '2026-01-01' + to_days((i * 90 // 3001)::int))::date as ordered_on
from range(1, 3001) as t (i)
"""


def main(folder: Path) -> None:
    (folder / "orders").mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as connection:
        connection.execute(f"create table orders as {ORDERS}")
        months = connection.execute("select distinct strftime(ordered_on, '%Y-%m') from orders order by 1").fetchall()
        files = {folder / "customers.csv": CUSTOMERS, folder / "products.json": PRODUCTS}
        for (month,) in months:
            files[folder / "orders" / f"{month}.parquet"] = (
                f"from orders where strftime(ordered_on, '%Y-%m') = '{month}' order by id"
            )
        for path, select in files.items():
            connection.execute(f"copy ({select}) to '{path}'")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "exports")
